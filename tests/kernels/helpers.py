"""What the tests of the Triton kernels share: drawing inputs, computing by any backend, allowed errors."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import entmax_attention
from kernels.alpha_entmax.operator import call_operators
from kernels.alpha_entmax.reference import entmax_reference
from kernels.alpha_entmax.results import Thresholds, WeightedSum
from kernels.common.backends import INTERPRETED
from kernels.common.visibility import visible_keys
from tests.kernels.conftest import CASES, HEADS, Case

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
needs_triton = [
    pytest.mark.skipif(not (CUDA or INTERPRETED), reason="needs a CUDA device or TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of the interpreter's log2(0) and 0 / 0
]
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
NAMES = ("out", "dq", "dk", "dv", "dalpha")
MIXED = [1.05, 1.3, 1.5, 1.9]
EPS = torch.finfo(torch.float32).eps
SIXTEEN_BITS = [torch.bfloat16, torch.float16]


def weight_rounding(n_keys: int) -> float:
    """What CUDA's exp2 and log2 add to the relative error of a weight 2 ** (x - log-sum-exp): each is off by up to
    2 ** -22 of its value (PTX ISA: ex2.approx, lg2.approx); the sum is one of powers, and its logarithm, at most that
    of the keys' number, stands in a power. The interpreter's are NumPy's, exact to float32's rounding."""
    return 2**-22 * (2 + math.log(n_keys)) if CUDA else 0.0


def assert_same(ours: Tensor, other: Tensor, backend: str) -> None:
    """The same bits, but for two roundings of the largest number where cuBLAS may add up in another order."""
    finite = other.masked_fill(other.isinf(), 0).abs().max()
    rounding = 2 * torch.finfo(other.dtype).eps * float(finite) if CUDA and backend == "torch" else 0.0
    torch.testing.assert_close(ours, other, atol=rounding, rtol=0)


def by_name(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def options_of(case: Case) -> dict[str, Any]:
    return {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in case.options.items()}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, size: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (size * torch.randn(shape, dtype=torch.float64, generator=generator)).to(DEVICE, dtype)


def draw_qkv(
    heads: int, kv_heads: int, n_queries: int, n_keys: int, head_dim: int = 16, batch: int = 1, **options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v (requiring grad) and a weight for the output."""
    sizes = [(heads, n_queries), (kv_heads, n_keys), (kv_heads, n_keys), (heads, n_queries)]
    q, k, v, weight = (draw(batch, *size, head_dim, seed=i, **options) for i, size in enumerate(sizes))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), weight


def per_head(alpha: float | list[float], heads: int = HEADS) -> Tensor:
    return torch.tensor(alpha, dtype=torch.float32, device=DEVICE).expand(heads).clone().requires_grad_()


def compute(
    inputs: tuple[Tensor, ...], alpha: float | Tensor, backend: str, dtype: torch.dtype | None = None, **options: Any
) -> tuple[Tensor, ...]:
    """Output, dq, dk, dv and, where alpha is a tensor, dalpha; in another dtype on the same (rounded) values."""
    q, k, v, weight = (x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs)
    if isinstance(alpha, Tensor):
        alpha = alpha.detach().to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    out = entmax_attention(q, k, v, alpha=alpha, backend=backend, **options)
    wanted = (q, k, v, alpha) if isinstance(alpha, Tensor) else (q, k, v)
    return out.detach(), *torch.autograd.grad(out, wanted, weight)


def visible_scores(q: Tensor, k: Tensor, **options: Any) -> Tensor:
    """(B, H, Tq, Tk): scaled scores with bias, -inf where invisible, of products rounded to the dtype of q and k."""
    n_queries, n_keys, repeat = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    slopes = options.pop("alibi_slopes", None)
    scale = options.pop("scale", q.shape[3] ** -0.5)
    geometry = {"causal": True, "cu_seqlens": None, "kv_lens": None, "window": None} | options
    visible = visible_keys(n_queries, n_keys, device=q.device, **geometry)
    scores = q @ k.repeat_interleave(repeat, 1).mT
    scores = scores.to(torch.float64 if q.dtype == torch.float64 else torch.float32) * scale
    if slopes is not None:
        distance = visible.position[:, :, None] - torch.arange(n_keys, device=q.device)
        scores = scores - slopes.to(scores.dtype)[:, None, None] * distance[:, None]
    return scores.masked_fill(~visible.mask(0, n_queries, 0, n_keys)[:, None], -torch.inf)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, alpha: float | Tensor, **options: Any) -> Tensor:
    """What plain PyTorch gives in the inputs' dtype: scores and weights are rounded to it."""
    scores = visible_scores(q, k, **options)
    alpha = alpha[:, None, None].to(scores.dtype) if isinstance(alpha, Tensor) else alpha
    return entmax_reference(scores, alpha).to(v.dtype) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)


def rounding(inputs: tuple[Tensor, ...], alpha: Tensor, truth: tuple[Tensor, ...], **options: Any) -> tuple:
    """What float32 may cost beyond the reference's error, as norms: two roundings of every result, and where sums
    cancel, roundings of their terms.

    The terms of dq and dk are ds = w (dP - delta), where dP and delta, dot products over the head dim, each carry
    about EPS * |dO * v| (norm of the elementwise product), also where their difference is 0. Those of dalpha are
    e = p (1 - log u) times beta ** 2 (dP - mean of dP): near alpha = 1, 1 - log u hardly varies and sum w (dP - mean)
    is 0, so they cancel to a 1/3000 ... 1/40000; each has a handful of roundings, together about 2 EPS. Independent
    errors add up as squares.

    Past alpha = 1.5 the slope of w = u ** (beta - 1) grows without bound towards u = 0. So what the rounding of a
    score, EPS |q| |k| by random walk, makes of w counts for pairs within 16 such roundings of the threshold, in ds and
    in the delta of dalpha: whether plain PyTorch lands as far from the truth there is chance.
    """
    q, k, v, weight = (x.detach().double() for x in inputs)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scale = options.get("scale", q.shape[3] ** -0.5)
    scores = visible_scores(q, k, **options)
    alpha = alpha.detach().double()[:, None, None]
    beta = 1 / (alpha - 1)
    p = entmax_reference(scores, alpha)
    u = torch.where(p > 0, p, 1) ** (alpha - 1)
    w = (p > 0) * u ** (beta - 1)
    product = (weight**2 @ (v**2).mT).sqrt()
    mean = ((w * product**2).sum(-1, keepdim=True) / w.sum(-1, keepdim=True).clamp(min=1e-300)).sqrt()
    dq = ((w * product) ** 2 @ k**2).sqrt() + mean * (w @ k).abs()
    dk = ((w * (product + mean)) ** 2).mT @ q**2
    z = (alpha - 1) * scores.double()
    above = z - (z - torch.where(p > 0, u, torch.inf)).amax(-1, keepdim=True)  # z - tau
    off = EPS * (alpha - 1) * scale * q.norm(dim=-1)[..., None] * k.norm(dim=-1)[:, :, None]
    close = (above.abs() <= 16 * off) & (beta < 2)
    doubt = torch.where(close, (above + off).clamp(min=0) ** (beta - 1) - (above - off).clamp(min=0) ** (beta - 1), 0)
    dp = weight @ v.mT
    sum_w = w.sum(-1, keepdim=True).clamp(min=1e-300)
    doubt = doubt * (dp - (w * dp).sum(-1, keepdim=True) / sum_w)
    dq_doubt, dk_doubt = (doubt**2 @ k**2).sum().sqrt() / EPS, (doubt.mT**2 @ q**2).sum().sqrt() / EPS
    entropy = beta**2 * p * (1 - u.log())  # d dalpha / d dP of a pair, and its sum over a row that of delta
    dalpha_doubt = (entropy.sum(-1) * doubt.norm(dim=-1) / sum_w[..., 0]).norm() / EPS
    dalpha = 2 * (entropy * (product + mean)).norm() + dalpha_doubt
    cancelled = (0.0, scale * (dq.norm() + dq_doubt), scale * (dk.sum().sqrt() + dk_doubt), 0.0, dalpha)
    return tuple(EPS * (2 * x.norm() + more) for x, more in zip(truth, cancelled, strict=False))


def assert_errors(ours: tuple, plain: tuple, truth: tuple, extra: tuple) -> None:
    """The output within 2x, gradients within 3x of what plain PyTorch loses, plus `extra`."""
    for name, mine, theirs, true, more in zip(NAMES, ours, plain, truth, extra, strict=False):
        allowed = (2 if name == "out" else 3) * (theirs.double() - true).norm() + more
        error = (mine.double() - true).norm()
        assert error <= allowed, f"{name}: {error:.3e} > {allowed:.3e}, norm {true.norm():.3e}"


def check_float32(inputs: tuple[Tensor, ...], alpha: float | list[float], **options: Any) -> None:
    given = alpha if isinstance(alpha, float) else per_head(alpha, inputs[0].shape[1])
    truth = compute(inputs, given, "reference", torch.float64, **options)
    plain = compute(inputs, given, "reference", **options)
    alphas = per_head(alpha, inputs[0].shape[1])
    assert_errors(compute(inputs, given, "triton", **options), plain, truth, rounding(inputs, alphas, truth, **options))


def operators(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, **changes: Any) -> tuple[WeightedSum, Thresholds]:
    """The registered operators with the usual arguments."""
    usual: dict[str, Any] = dict(
        scale=q.shape[3] ** -0.5,
        power="general",
        causal=True,
        cu_seqlens=None,
        kv_lens=None,
        alibi_slopes=None,
        window=None,
        gradient=False,
        stats=False,
        skip_far=True,
    )
    return call_operators(q, k, v, alpha, **{**usual, **changes})


def check_any_strides(run: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> None:
    """run gives the same bits for tensors (B, heads, T, D) that are views of others, or stand in columns."""
    views = tuple(
        torch.cat([x, x + 1], 1).transpose(1, 2).contiguous().transpose(1, 2)[:, : x.shape[1]] for x in inputs
    )
    columns = tuple(x.mT.contiguous().mT for x in inputs)
    expected = run(*inputs)
    for tensors in (inputs, views, columns):
        for ours, first in zip(run(*tensors), expected, strict=True):
            assert torch.equal(ours, first)
