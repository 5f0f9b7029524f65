"""Rounding errors of the Triton kernels against float64, beside those of plain PyTorch in the same input dtype."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import relative_error
from benchmarks.oracle import attention_oracle
from benchmarks.peers import OURS, call_kernels
from benchmarks.workloads import Workload, gaussian
from kernels import entmax_attention

ALPHAS = (1.05, 1.1, 1.25, 1.5, 1.75, 2.0)
NAMES = ("out", "dq", "dk", "dv", "dalpha")
RATIO_BAR = {"out": 2.0}  # times the oracle's error; gradients: 3
BF16_BAR = {"out": 5e-3, "dalpha": 2e-2}  # relative norm; the others: 1e-2


@dataclass(frozen=True)
class ErrorCase:
    """bounds: cu_seqlens, or None."""

    name: str
    n_tokens: int
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 64
    bounds: tuple[int, ...] | None = None
    alibi: bool = False

    def workload(self, dtype: torch.dtype, alpha: float, seed: int, device: str) -> Workload:
        """Gaussian scores of deviation 2. alpha: one number, as a tensor that requires grad."""
        q, k, v = gaussian(self.n_tokens, self.heads, self.head_dim, seed=seed, device=device, dtype=dtype)
        bounds = None if self.bounds is None else torch.tensor(self.bounds, dtype=torch.int32, device=device)
        slopes = None
        if self.alibi:  # the last head without position, as in nape
            slopes = torch.tensor([2.0**-i for i in range(self.heads - 1)] + [0.0], device=device)
        alphas = torch.full((self.heads,), alpha, device=device, requires_grad=True)
        k, v = (x[:, : self.kv_heads].contiguous() for x in (k, v))
        return Workload(f"{self.name}, alpha {alpha}", q, k, v, alphas, bounds, slopes)


CASES = (
    ErrorCase("causal", 1024),
    ErrorCase("odd length", 1111),
    ErrorCase("odd length, head dim 128", 777, head_dim=128),
    ErrorCase("grouped heads", 1000, kv_heads=2),
    ErrorCase("packed", 1500, bounds=(0, 1, 64, 64, 700, 1499, 1500)),
    ErrorCase("ALiBi", 1200, alibi=True),
    ErrorCase("packed, grouped, ALiBi", 901, kv_heads=1, bounds=(0, 333, 334, 901), alibi=True),
    ErrorCase("long", 4096, heads=2, kv_heads=2),
)


def _truth(workload: Workload, cotangent: Tensor) -> dict[str, Tensor]:
    """Reference in float64 on the same rounded values, by autograd."""
    q, k, v = (x.detach().double().requires_grad_() for x in workload.inputs(False))
    alpha = torch.as_tensor(workload.alpha).detach().double().requires_grad_()
    out = entmax_attention(q, k, v, backend="reference", **{**workload.options, "alpha": alpha})
    assert isinstance(out, Tensor)
    gradients = torch.autograd.grad(out, (q, k, v, alpha), cotangent.double())
    return dict(zip(NAMES, (out.detach(), *gradients), strict=True))


def threshold_bar(z_max: float) -> float:
    """max(1e-5, 4 units in the last place of float32 at z_max)."""
    ulp = 2.0 ** (math.floor(math.log2(z_max)) - 23) if z_max > 0 else 0.0
    return max(1e-5, 4 * ulp)


def error_row(
    case: ErrorCase, alpha: float, dtype: torch.dtype, *, seed: int = 0, device: str = "cuda", float_alpha: bool = False
) -> dict[str, Any]:
    """One row of the table: errors of ours and of the oracle, their ratio, threshold error, and what is over its bar.

    float_alpha: alpha as a number, the specialised kernels of 1.5 and 2; then without dalpha.
    """
    workload = case.workload(dtype, alpha, seed, device)
    generator = torch.Generator(device).manual_seed(seed + 1)
    cotangent = torch.randn(workload.q.shape, generator=generator, device=device).to(dtype)
    truth = _truth(workload, cotangent)
    q, k, v = workload.inputs(False)
    alphas, geometry = workload.alpha, (workload.cu_seqlens, workload.alibi_slopes)
    assert isinstance(alphas, Tensor)
    oracle = attention_oracle(q, k, v, cotangent, alphas, *geometry)
    exact = attention_oracle(q.double(), k.double(), v.double(), cotangent.double(), alphas, *geometry)
    if float_alpha:
        workload = replace(workload, alpha=alpha)
    out = OURS.prepare(workload)()
    gradients = torch.autograd.grad(out, workload.inputs(True), cotangent)
    ours = dict(zip(NAMES, (out.detach(), *gradients), strict=False))
    tau = call_kernels(workload, gradient=True, skip_far=True).tau
    tau_error, z_max = float((tau.double() - exact["tau"]).abs().max()), float(exact["z_max"])

    row: dict[str, Any] = dict(
        case=case.name, dtype=str(dtype).removeprefix("torch."), alpha=f"{alpha}{' (number)' if float_alpha else ''}"
    )
    over = []
    for name, x in ours.items():
        mine, theirs = relative_error(x, truth[name]), relative_error(oracle[name], truth[name])
        row |= {name: mine, f"{name} oracle": theirs, f"{name} ratio": mine / theirs if theirs else math.inf}
        # not a comparison with <=, which NaN would pass
        if not mine <= RATIO_BAR.get(name, 3.0) * theirs:
            over.append(f"{name} ratio")
        if dtype == torch.bfloat16 and not mine <= BF16_BAR.get(name, 1e-2):
            over.append(name)
    row |= {"tau error": tau_error, "tau bar": threshold_bar(z_max), "max |z|": z_max}
    if not tau_error <= row["tau bar"]:
        over.append("tau")
    return row | {"over the bar": ", ".join(over)}
