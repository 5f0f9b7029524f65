"""What the kernel benchmark times: this project's attention and its peers, each as a function of a workload."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.workloads import Workload
from kernels import entmax_attention
from kernels.alpha_entmax.operator import run_attention
from kernels.alpha_entmax.results import WeightedSum
from kernels.alpha_entmax.threshold import power_of
from model.compiling import share_cores

Forward = Callable[[], Tensor]


class Unsupported(Exception):
    """The workload is outside of what an implementation can do, or its package is not installed; says why."""


@dataclass(frozen=True)
class Implementation:
    """prepare: makes everything that is not timed (masks, compiled functions) and returns the forward pass over the
    workload's own tensors; raises Unsupported. kind: the function that it computes."""

    name: str
    kind: Literal["entmax", "softmax"]
    prepare: Callable[[Workload], Forward]
    takes_bias: bool = True  # without it ALiBi rows are run without their bias, which the table says


def _ours(workload: Workload) -> Forward:
    def forward() -> Tensor:
        out = entmax_attention(workload.q, workload.k, workload.v, backend="triton", **workload.options)
        assert isinstance(out, Tensor)
        return out

    return forward


def call_kernels(workload: Workload, *, gradient: bool, skip_far: bool, stats: bool = False) -> WeightedSum:
    """The kernels without the public function's choices."""
    q, alpha = workload.q, workload.alpha
    if not isinstance(alpha, Tensor):
        alpha = torch.full((q.shape[1],), alpha, device=q.device)
    visible = (True, workload.cu_seqlens, None, workload.alibi_slopes, None)
    shared = (q.shape[3] ** -0.5, power_of(workload.alpha))
    return run_attention(q, workload.k, workload.v, alpha, *shared, *visible, gradient, stats, skip_far)[0]


def _ours_without_skip(workload: Workload) -> Forward:
    return lambda: call_kernels(workload, gradient=torch.is_grad_enabled(), skip_far=False).out


OURS = Implementation("ours", "entmax", _ours)
OURS_WITHOUT_SKIP = Implementation("ours, no skip", "entmax", _ours_without_skip)


def _sdpa(backend: SDPBackend, workload: Workload) -> Forward:
    if workload.cu_seqlens is not None:
        raise Unsupported("takes no packed documents")
    grouped = workload.q.shape[1] != workload.k.shape[1]

    def forward() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(workload.q, workload.k, workload.v, is_causal=True, enable_gqa=grouped)

    return forward


def _causal_block_mask(workload: Workload) -> BlockMask:
    n_tokens, device = workload.q.shape[2], workload.q.device
    if workload.cu_seqlens is None:

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return j <= i
    else:
        document = torch.searchsorted(workload.cu_seqlens, torch.arange(n_tokens, device=device), right=True)

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & (document[i] == document[j])

    return create_block_mask(visible, None, None, n_tokens, n_tokens, device=device, _compile=True)


def _flex(workload: Workload) -> Forward:
    """FlexAttention, compiled for this workload's shapes alone (dynamic shapes are slower, and past eight of them
    torch.compile would give up)."""
    torch.compiler.reset()
    share_cores(1)
    slopes = workload.alibi_slopes

    def alibi(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert slopes is not None
        return score - slopes[h] * (i - j)

    compiled: Any = torch.compile(flex_attention, dynamic=False)
    block_mask = _causal_block_mask(workload)
    return functools.partial(
        compiled,
        workload.q,
        workload.k,
        workload.v,
        score_mod=None if slopes is None else alibi,
        block_mask=block_mask,
        enable_gqa=workload.q.shape[1] != workload.k.shape[1],
    )


def _varlen(workload: Workload) -> Forward:
    if workload.cu_seqlens is None:
        raise Unsupported("is for packed documents")
    if workload.alibi_slopes is not None:
        raise Unsupported("takes no ALiBi slopes")
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise Unsupported(f"not in torch {torch.__version__}") from error
    # torch 2.11 takes grouped heads as they are, later releases want to be told
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    options: dict[str, Any] = dict(window_size=(-1, 0), **grouped)
    bounds, longest = workload.cu_seqlens, int(workload.cu_seqlens.diff().max())

    def forward() -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (workload.q, workload.k, workload.v))  # [T, H, D]
        out = varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)
        assert isinstance(out, Tensor)
        return out.transpose(0, 1)[None]

    return forward


def _adasplash(workload: Workload) -> Forward:
    _, _, n_tokens, head_dim = workload.q.shape
    if workload.cu_seqlens is not None or workload.alibi_slopes is not None:
        raise Unsupported("takes neither packed documents nor ALiBi slopes")
    if isinstance(workload.alpha, Tensor) or workload.alpha != 1.5:
        raise Unsupported("knows alpha 1.5 only")
    if n_tokens & (n_tokens - 1) or n_tokens < 64 or head_dim not in (16, 32, 64, 128, 256):
        raise Unsupported(f"takes powers of two only, got {n_tokens} tokens and head dim {head_dim}")
    function = _load_adasplash()
    return lambda: function(workload.q, workload.k, workload.v, niter=1)


@functools.cache
def _load_adasplash() -> Callable[..., Tensor]:
    """Its autotuning results are kept in Triton's cache folder, so that a length is tuned once and pinned after."""
    import triton

    before = triton.knobs.autotuning.cache
    triton.knobs.autotuning.cache = True  # read when its kernels are decorated
    try:
        import adasplash
        import adasplash.adasplash_v2 as module
    except ImportError as error:
        raise Unsupported("not installed (pip install adasplash==0.2.2)") from error
    finally:
        triton.knobs.autotuning.cache = before
    if getattr(module, "DEBUG", False):
        raise Unsupported("unset ADASPLASH_TEST_FAST_AUTOTUNE, which leaves it one slow configuration")
    return adasplash.adasplash2


PEERS = {
    "flash": Implementation("FA2", "softmax", functools.partial(_sdpa, SDPBackend.FLASH_ATTENTION), takes_bias=False),
    "cudnn": Implementation("cuDNN", "softmax", functools.partial(_sdpa, SDPBackend.CUDNN_ATTENTION), takes_bias=False),
    "flex": Implementation("FlexAttention", "softmax", _flex),
    "varlen": Implementation("varlen_attn", "softmax", _varlen),
    "adasplash": Implementation("AdaSplash-2", "entmax", _adasplash),
}
DEFAULT_PEERS = ("flash", "cudnn", "flex", "varlen")  # adasplash tunes itself for 80 to 210 s a length
