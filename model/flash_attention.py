"""FlashAttention-4 (flash-attn-4 on PyPI) in the place of cuDNN's attention and FlashAttention-2, in training.

torch.nn.attention.activate_flash_attention_impl exchanges the kernels behind torch's operators, for the whole process.
The package is a beta that torch's glue does not fit in every version, so it is tried before it is used.
"""

import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from model.config import ModelConfig

PACKAGE = "flash-attn-4"
MAJORS = (9, 10)  # of compute capability: Hopper and datacenter Blackwell
PROBE_TOKENS = 256
WORSE = 4  # times the error of plain products in bfloat16 at which a kernel counts as wrong

_exchanged = _active = False  # torch's kernels, and these in use


def is_active() -> bool:
    """Whether softmax attention in half precision goes through it, in this process."""
    return _active


def activate(config: ModelConfig, device: torch.device) -> str | None:
    """Has softmax attention of this model computed by FlashAttention-4, where the package is installed, the device is
    of its kind and its kernels give what plain products give: these are compiled and tried here, in some 10 s.

    Returns: a line for the user: that it is used, or, where it is installed, why it is not; None where there is nothing
    to say: not installed, or no attention that it could compute (no softmax, ALiBi, a window, no CUDA).
    """
    global _exchanged, _active
    deactivate()
    fits = config.attention.is_softmax and config.positions != "nape" and config.window is None
    if not fits or device.type != "cuda":
        return None
    try:
        installed = version(PACKAGE)
    except PackageNotFoundError:
        return None
    instead = "attention by cuDNN and FlashAttention-2"
    major = torch.cuda.get_device_capability(device)[0]
    if major not in MAJORS:
        return f"{PACKAGE} {installed} has no kernels for {torch.cuda.get_device_name(device)}: {instead}"
    try:
        torch.nn.attention.activate_flash_attention_impl("FA4")
        _exchanged = True
        try_kernels(config, device)
    except Exception as error:  # of any part of a beta and what it compiles with
        deactivate()
        reason = " ".join(str(error).split())[:300]
        return (
            f"{PACKAGE} {installed} cannot be used with torch {torch.__version__} "
            f"({type(error).__name__}: {reason}): {instead}"
        )
    _active = True
    return f"softmax attention by FlashAttention-4 ({PACKAGE} {installed})"


def deactivate() -> None:
    """Back to torch's own kernels."""
    global _exchanged, _active
    if _exchanged:
        torch.nn.attention.restore_flash_attention_impl()
    _exchanged = _active = False


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


def try_kernels(config: ModelConfig, device: torch.device) -> None:
    """Outputs and gradients of both ways of calling against attention by plain products in float32.

    Raises: RuntimeError where one is off by more than WORSE times what plain products in bfloat16 lose, and whatever
    the kernels raise.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, heads, PROBE_TOKENS, config.head_size) for heads in (config.n_heads, *2 * [config.n_cached_heads])]
    *inputs, gradient = (torch.randn(size, generator=generator).to(device) for size in (*sizes, sizes[0]))
    bounds = torch.tensor([0, PROBE_TOKENS // 3, PROBE_TOKENS], dtype=torch.int32, device=device)

    def documents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        return packed(q, k, v, bounds, PROBE_TOKENS).transpose(0, 1)[None]

    for name, kernel, cuts in (("dense", dense, [0, PROBE_TOKENS]), ("packed", documents, bounds.tolist())):
        plain = partial(_plain_products, cuts=cuts)
        truth = _pass(plain, inputs, gradient, torch.float32)
        lost = _pass(plain, inputs, gradient, torch.bfloat16)
        found = _pass(kernel, inputs, gradient, torch.bfloat16)
        for part, one, rounded, true in zip(("output", "dq", "dk", "dv"), found, lost, truth, strict=True):
            error, allowed = (one - true).norm().item(), WORSE * (rounded - true).norm().item()
            if not error <= allowed:
                raise RuntimeError(f"{part} of {name} attention is off by {error:.2g}, expected at most {allowed:.2g}")


def _plain_products(q: Tensor, k: Tensor, v: Tensor, cuts: list[int]) -> Tensor:
    """Causal attention of documents between these cuts, by matrix products. Shapes as of `dense`."""
    outs = []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        q_part, k_part, v_part = (x[:, :, start:stop] for x in (q, k, v))
        with sdpa_kernel([SDPBackend.MATH]):
            outs.append(scaled_dot_product_attention(q_part, k_part, v_part, is_causal=True, enable_gqa=True))
    return torch.cat(outs, dim=2)


def _pass(attend: Callable[..., Tensor], inputs: list[Tensor], gradient: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients of q, k and v, float32, for inputs rounded to bfloat16."""
    leaves = [x.to(torch.bfloat16).to(dtype).requires_grad_() for x in inputs]
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Attempting to run cuBLAS")  # before a process's first step
        out = attend(*leaves)
        gradients = torch.autograd.grad(out, leaves, gradient.to(torch.bfloat16).to(dtype))
    return [x.detach().float() for x in (out, *gradients)]
