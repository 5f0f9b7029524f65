"""The public attention function: checks its arguments, picks a backend."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.alpha_entmax.blockwise import entmax_attention_blockwise
from kernels.alpha_entmax.decode import entmax_decode
from kernels.alpha_entmax.operator import intercepted, run_attention
from kernels.alpha_entmax.reference import entmax_attention_reference
from kernels.alpha_entmax.threshold import power_of
from kernels.alpha_entmax.tuning import widest_head_dim
from kernels.common.arguments import (
    check_alpha,
    check_flag,
    check_integer,
    check_number,
    check_slopes,
    check_tensor,
    readable,
)
from kernels.common.backends import choose_backend
from kernels.common.derivatives import refuse_transforms
from kernels.common.stats import AttentionStats
from kernels.common.tuning import shared_memory
from kernels.common.visibility import visible_keys

BACKENDS = ("auto", "triton", "torch", "reference")
MAX_TRITON_HEAD_DIM = 256
WidestHeadDim = Callable[[torch.dtype, int], int]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def entmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alpha: float | Tensor = 1.5,
    scale: float | None = None,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    kv_lens: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    window: int | None = None,
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, AttentionStats]:
    """Attention whose weights are alpha-entmax of the scores: irrelevant keys get exactly zero (arXiv:1905.05702,
    arXiv:2502.12082).

    Layout and meaning follow torch's scaled_dot_product_attention. Autocast changes nothing: operands count in the
    dtype they come in, scores and sums are float32 (float64 for float64).

    Args:
        q: (B, H, Tq, D), float64, float32, bfloat16 or float16.
        k, v: (B, G, Tk, D), dtype and device of q, H a multiple of G (grouped-query heads).
        alpha: in (1, 2], from 1.0001 on (in float64 from 1 + 1e-12): a number or a tensor (H,) (which may require
            grad). 1.5 is entmax-1.5, 2 is sparsemax, softmax as alpha -> 1.
        scale: positive, multiplies the scores; None is D ** -0.5.
        causal: a query sees no later key; the last query stands at the last (valid) key.
        cu_seqlens: int32 (documents + 1,) on q's device, 0 first, never decreasing, Tq last; B = 1 and Tq = Tk.
            Documents may be empty.
        kv_lens: int32 (B,) on q's device, valid keys of each batch row; the last query stands at the last valid key.
            Not with cu_seqlens.
        alibi_slopes: (H,) non-negative; adds -slope * (query position - key position) to the scaled scores. Not
            differentiable.
        window: a query sees itself and the window - 1 keys before it; needs causal.
        backend: "triton" (CUDA, or CPU tensors under TRITON_INTERPRET=1; not float64, head dims to 256), "torch" (a
            block of rows at a time, O(Tq) memory), "reference" (dense, differentiable by autograd) or "auto": triton
            on CUDA where it can, else torch, with one warning. On GPUs with 99 or 163 KiB of shared memory (RTX 30 to
            50, A100) triton takes head dims to 128 in float32.
        return_stats: also return an AttentionStats.

    Returns: (B, H, Tq, D) in q's dtype, differentiable in q, k, v and alpha: twice by "reference", once by the others,
    which raise RuntimeError where a gradient is differentiated and NotImplementedError under torch.func's transforms
    and forward mode; with return_stats a pair (output, AttentionStats). By "triton" its memory is that of (B, Tq, H,
    D), which a projection of all heads takes as it is. A row that sees no key is 0. What is not finite spoils the rows
    that see it, as in softmax attention; scores of -inf get weight 0.

    Raises: TypeError or ValueError naming the argument, its value and what was expected. The contents of cu_seqlens,
    kv_lens, alibi_slopes and a tensor alpha are checked on CPU tensors only (on CUDA this would synchronise): there
    wrong ones give wrong results. Lengths beyond the keys are taken as the nearest that are not: nothing outside of k
    and v is read.
    """
    check_tensors(q, k, v)
    check_flag("causal", causal)
    check_flag("return_stats", return_stats)
    _check_visibility(q, k, causal, cu_seqlens, kv_lens, window)
    heads, device = q.shape[1], q.device
    given, alpha = alpha, _alpha_per_head(alpha, heads, q)
    power = power_of(given)
    scale = checked_scale(q, scale, alibi_slopes)
    backend = choose_backend(backend, BACKENDS, q, unsupported_by_triton(q.dtype, q.shape[3], q.device))
    visible: dict[str, Any] = dict(causal=causal, cu_seqlens=cu_seqlens, kv_lens=kv_lens, window=window)
    if backend == "reference":
        keys = visible_keys(q.shape[2], k.shape[2], device=device, **visible)
        out, stats = entmax_attention_reference(q, k, v, alpha, keys, scale, alibi_slopes, return_stats)
        return (out, stats) if stats is not None else out
    refuse_transforms(f"attention by backend {backend!r}", "take backend='reference'", q, k, v, alpha)
    passes = None
    if backend == "triton":
        gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, alpha))
        if q.shape[2] == 1 and not (gradient or return_stats or intercepted(q, k, v, alpha)):
            # one query stands at the last valid key, alone in its document: causality hides nothing
            return entmax_decode(q, k, v, alpha, scale, power, kv_lens, alibi_slopes, window)
        result, passes = run_attention(
            q,
            k,
            v,
            alpha,
            scale,
            power,
            causal,
            cu_seqlens,
            kv_lens,
            alibi_slopes,
            window,
            gradient,
            return_stats,
            True,
        )
        out, _, support, live = result
    else:
        out, _, support, live = entmax_attention_blockwise(
            q, k, v, alpha, scale, alibi_slopes=alibi_slopes, with_stats=return_stats, **visible
        )
    if not return_stats:
        return out
    total = visible_keys(q.shape[2], k.shape[2], device=device, **visible).total_tiles().expand(q.shape[0])
    return out, AttentionStats(support, live, total, None if passes is None else passes.float().mean(-1))


def unsupported_by_triton(
    dtype: torch.dtype, head_dim: int, device: torch.device, widest_head_dim: WidestHeadDim = widest_head_dim
) -> str | None:
    """What Triton kernels cannot do for queries of this kind; None where they can. widest_head_dim: heads of a dtype
    that fit into a device's shared memory of so many bytes."""
    if dtype == torch.float64 or head_dim > MAX_TRITON_HEAD_DIM:
        return (
            f"takes float32, bfloat16 and float16 and head dims up to {MAX_TRITON_HEAD_DIM}, got {dtype} and {head_dim}"
        )
    if device.type == "cuda":
        there = shared_memory(device)
        if head_dim > (widest := widest_head_dim(dtype, there)):
            return (
                f"takes {dtype} with head dims up to {widest} on a GPU with {there // 1024} KiB of shared memory, "
                f"got {head_dim}"
            )
    return None


def checked_scale(q: Tensor, scale: float | None, alibi_slopes: Tensor | None) -> float:
    """The factor of the scores of q (B, H, Tq, D). Raises ValueError for one that is not positive and finite, and for
    slopes that are not (H,), finite and at least 0."""
    check_slopes(alibi_slopes, q.shape[1], q.device)
    if scale is not None:
        check_number("scale", scale)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite, got {scale}; put a sign into q")
    return scale


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
        if x.dim() != 4 or x.shape[3] == 0:
            raise ValueError(f"{name} must be (batch, heads, tokens, head dim), got {tuple(x.shape)}")
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            raise ValueError(f"q, k and v must share one of {DTYPES}, got {name} of {x.dtype} beside q of {q.dtype}")
        if x.device != q.device:
            raise ValueError(f"q, k and v must be on one device, got {name} on {x.device} and q on {q.device}")
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"k and v must be (B, G, Tk, D) with B = {q.shape[0]} and D = {q.shape[3]} of q {tuple(q.shape)}, "
            f"got k {tuple(k.shape)} and v {tuple(v.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of key/value heads, got {q.shape[1]} and {k.shape[1]}")


def _alpha_per_head(alpha: float | Tensor, heads: int, q: Tensor) -> Tensor:
    """alpha as (H,) in float32 (float64 for float64 input), on q's device."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    check_alpha(alpha, dtype, "scaled_dot_product_attention")
    if not isinstance(alpha, Tensor):
        return torch.full((heads,), float(alpha), dtype=dtype, device=q.device)
    if alpha.shape not in ((), (heads,)):
        raise ValueError(f"alpha must be a number or a tensor ({heads},), one per query head, got {tuple(alpha.shape)}")
    return alpha.to(q.device, dtype).expand(heads)


def _check_visibility(
    q: Tensor, k: Tensor, causal: bool, cu_seqlens: Tensor | None, kv_lens: Tensor | None, window: int | None
) -> None:
    batch, n_queries, n_keys = q.shape[0], q.shape[2], k.shape[2]
    if window is not None:
        check_integer("window", window)
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window must be at least 1 and needs causal=True, got window={window} with causal={causal}")
    for name, x in (("cu_seqlens", cu_seqlens), ("kv_lens", kv_lens)):
        if x is not None:
            check_tensor(name, x)
        if x is not None and (x.dtype != torch.int32 or x.dim() != 1 or x.device != q.device):
            raise ValueError(f"{name} must be 1-d int32 on {q.device}, got {x.dim()}-d {x.dtype} on {x.device}")
    if cu_seqlens is not None:
        if kv_lens is not None:
            raise ValueError(
                "cu_seqlens and kv_lens exclude each other: packed documents already say which keys are valid"
            )
        if batch != 1 or n_queries != n_keys:
            raise ValueError(f"cu_seqlens needs B = 1 and Tq = Tk, got B = {batch}, Tq = {n_queries}, Tk = {n_keys}")
        if len(cu_seqlens) < 2:
            raise ValueError(f"cu_seqlens must be (documents + 1,) of at least one document, got {len(cu_seqlens)}")
        if readable(q) and not (
            cu_seqlens[0] == 0 and cu_seqlens[-1] == n_queries and bool((cu_seqlens.diff() >= 0).all())
        ):
            raise ValueError(f"cu_seqlens must rise from 0 to T = {n_queries}, got {cu_seqlens.tolist()}")
    if kv_lens is not None:
        if kv_lens.shape != (batch,):
            raise ValueError(f"kv_lens must be ({batch},), one per batch row, got {tuple(kv_lens.shape)}")
        if readable(q) and bool(((kv_lens < 0) | (kv_lens > n_keys)).any()):
            raise ValueError(f"kv_lens must lie in 0 ... Tk = {n_keys}, got {kv_lens.tolist()}")
