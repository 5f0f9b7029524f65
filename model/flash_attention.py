"""FlashAttention-4 (flash-attn-4 on PyPI) in the place of cuDNN's attention and FlashAttention-2, in training steps.

torch.nn.attention.activate_flash_attention_impl exchanges the kernels behind torch's operators, for the whole process.
The package is a beta whose later releases torch's glue does not fit, so it is tried before it is used.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from model.config import ModelConfig

PACKAGE = "flash-attn-4"
MAJORS = (9, 10)  # of compute capability: Hopper and datacenter Blackwell
INSTEAD = "attention by torch's own kernels"
PROBE_TOKENS = 256
WORSE = 4  # times the error of plain products in the same dtype at which a kernel counts as wrong

_active = False  # torch's kernels are exchanged


@dataclass(frozen=True)
class Heads:
    """What one rank attends with: numbers of query heads and of key heads, and the head dim."""

    queries: int
    keys: int
    dim: int

    @classmethod
    def of(cls, config: ModelConfig, ranks: int) -> "Heads":
        """ranks: that share each sequence (model.sequence_parallel.HeadExchange)."""
        keys = config.n_cached_heads
        return cls(config.n_heads // ranks, keys // min(keys, ranks), config.head_size)


def is_active() -> bool:
    """Whether softmax attention in half precision goes through it, in this process, now."""
    return _active


def activate(
    configs: Sequence[ModelConfig],
    device: torch.device,
    dtype: torch.dtype | None,
    ranks: int = 1,
    compiled: bool = False,
) -> str | None:
    """Has softmax attention of these models computed by FlashAttention-4, where the package is installed, the device is
    of its kind and its kernels give what plain products give: these are compiled and tried here, in some 10 to 20 s.

    Args:
        configs: of all models that are to run in this process.
        dtype: that attention computes in; None for others than bfloat16 and float16.
        ranks: that share each sequence.
        compiled: whether torch.compile compiles what calls it, which is tried too then.

    Returns: a line for the user: that it is used, or, where it is installed, why it is not; None where there is nothing
    to say: not installed, or no softmax, no half precision, no CUDA.

    Raises: RuntimeError where the trial has left the device broken.
    """
    deactivate()
    softmax = [config for config in configs if config.attention.is_softmax]
    if not softmax or dtype is None or device.type != "cuda":
        return None
    try:
        installed = f"{PACKAGE} {version(PACKAGE)}"
    except PackageNotFoundError:
        return None
    if any(config.positions == "nape" or config.window is not None for config in softmax):
        return f"{installed} is not used, attention has ALiBi (positions: nape) or a window: {INSTEAD}"
    if torch.cuda.get_device_capability(device)[0] not in MAJORS:
        return f"{installed} has no kernels for {torch.cuda.get_device_name(device)}: {INSTEAD}"
    try:
        reactivate()
        for heads in {Heads.of(config, ranks) for config in softmax}:
            try_kernels(heads, device, dtype, compiled)
    except Exception as error:  # of any part of a beta and what it compiles with
        deactivate()
        torch.cuda.synchronize(device)  # raises where a kernel has crashed, after which nothing would run
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return f"{installed} cannot be used with torch {torch.__version__} ({reason}): {INSTEAD}"
    return f"softmax attention by FlashAttention-4 ({installed})"


def deactivate() -> bool:
    """Back to torch's own kernels. Returns whether there was anything to put back."""
    global _active
    active, _active = _active, False
    if active:
        torch.nn.attention.restore_flash_attention_impl()
    return active


def reactivate() -> None:
    """As `activate` left it, without another trial."""
    global _active
    torch.nn.attention.activate_flash_attention_impl("FA4")
    _active = True


@contextmanager
def suspended() -> Iterator[None]:
    """Torch's own kernels within: evaluation decodes and reads contexts of lengths that were not tried."""
    active = deactivate()
    try:
        yield
    finally:
        if active:
            reactivate()


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of whole rows. q: (B, H, T, D), k and v: (B, G, T, D), bfloat16 or float16 -> (B, H, T, D)."""
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Causal attention within documents. q: (T, H, D), k and v: (T, G, D) -> (T, H, D).

    The operator below varlen_attn, which names a causal mask as a window: torch 2.11 has no backward pass by
    FlashAttention-4 for windows.
    """
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    # torch.compile expects results laid out as the inputs are, and they come contiguous
    rows = (x.contiguous() for x in (q, k, v))
    out: Tensor = torch.ops.aten._flash_attention_forward(*rows, *lengths, 0.0, True, False)[0]
    return out


def try_kernels(heads: Heads, device: torch.device, dtype: torch.dtype, compiled: bool) -> None:
    """Outputs and gradients of both ways of calling against attention by plain products in float32. compiled: of calls
    within torch.compile too, which holds kernels to the layout of results that it expects.

    Raises: RuntimeError where one is off by more than WORSE times what plain products in this dtype lose, and whatever
    the kernels raise.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, count, PROBE_TOKENS, heads.dim) for count in (heads.queries, heads.keys, heads.keys)]
    *inputs, gradient = (torch.randn(size, generator=generator).to(device) for size in (*sizes, sizes[0]))
    bounds = torch.tensor([0, PROBE_TOKENS // 3, PROBE_TOKENS], dtype=torch.int32, device=device)

    def documents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        return packed(q, k, v, bounds, PROBE_TOKENS).transpose(0, 1)[None]

    ways: list[tuple[str, Callable[..., Tensor], list[int]]] = [
        ("dense", dense, [0, PROBE_TOKENS]),
        ("packed", documents, bounds.tolist()),
    ]
    if compiled:
        ways += [(f"compiled {name}", torch.compile(kernel), cuts) for name, kernel, cuts in ways]
    for name, kernel, cuts in ways:
        plain = partial(plain_products, cuts=cuts)
        truth = outputs_and_gradients(plain, inputs, gradient, dtype, torch.float32)
        lost = outputs_and_gradients(plain, inputs, gradient, dtype, dtype)
        found = outputs_and_gradients(kernel, inputs, gradient, dtype, dtype)
        for part, one, rounded, true in zip(("output", "dq", "dk", "dv"), found, lost, truth, strict=True):
            error, allowed = (one - true).norm().item(), WORSE * (rounded - true).norm().item()
            if not error <= allowed:
                raise RuntimeError(f"{part} of {name} attention is off by {error:.2g}, expected at most {allowed:.2g}")


def plain_products(q: Tensor, k: Tensor, v: Tensor, cuts: list[int]) -> Tensor:
    """Causal attention of documents between these cuts, by matrix products. Shapes as of `dense`."""
    outs = []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        q_part, k_part, v_part = (x[:, :, start:stop] for x in (q, k, v))
        with sdpa_kernel([SDPBackend.MATH]):
            outs.append(scaled_dot_product_attention(q_part, k_part, v_part, is_causal=True, enable_gqa=True))
    return torch.cat(outs, dim=2)


def outputs_and_gradients(
    attend: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    gradient: Tensor,
    given: torch.dtype,
    computed: torch.dtype,
) -> list[Tensor]:
    """The output and the gradients of q, k and v, float32 (float64 where computed in it), for inputs rounded to
    `given`."""
    leaves = [x.to(given).to(computed).requires_grad_() for x in inputs]
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Attempting to run cuBLAS")  # before a process's first step
        out = attend(*leaves)
        gradients = torch.autograd.grad(out, leaves, gradient.to(given).to(computed))
    wide = torch.promote_types(computed, torch.float32)
    return [x.detach().to(wide) for x in (out, *gradients)]
