"""Softmax attention for the twins, by the fastest library path of each case."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

# torch 2.11 takes grouped heads as they are, later releases want to be told
VARLEN_GQA: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
MASK_ELEMENTS = 2**22  # bias values held at once by the CPU path (16 MiB of float32)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    alibi_slopes: Tensor | None,
    window: int | None,
    block_mask: BlockMask | None,
) -> Tensor:
    """Causal softmax attention; shapes, documents, slopes and window as in kernels.entmax_attention.

    CUDA: FlexAttention for ALiBi (and windows of unpacked batches), torch's varlen_attn (FlashAttention) for packed
    half-precision documents, scaled_dot_product_attention otherwise. CPU: scaled_dot_product_attention per document.

    Args:
        max_seqlen: an upper bound of the documents' lengths.
        block_mask: from `document_block_mask`, where `uses_flex` says so.
    """
    if q.is_cuda and uses_flex(q.device, cu_seqlens, alibi_slopes, window):
        score_mod = None if alibi_slopes is None else _alibi_score_mod(alibi_slopes)
        flex: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
        return flex(q, k, v, score_mod=score_mod, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])
    if q.is_cuda and cu_seqlens is not None and q.dtype in (torch.bfloat16, torch.float16):
        return _varlen(q, k, v, cu_seqlens, max_seqlen, window)
    if cu_seqlens is None:
        return _dense(q, k, v, alibi_slopes, window)
    bounds = cu_seqlens.tolist()
    parts = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        if stop > start:
            document = slice(start, stop)
            parts.append(_dense(q[:, :, document], k[:, :, document], v[:, :, document], alibi_slopes, window))
    return torch.cat(parts, dim=2)


def uses_flex(device: torch.device, cu_seqlens: Tensor | None, alibi_slopes: Tensor | None, window: int | None) -> bool:
    """Whether softmax_attention needs a block mask for this case."""
    return device.type == "cuda" and (alibi_slopes is not None or (window is not None and cu_seqlens is None))


def document_block_mask(
    n_tokens: int, cu_seqlens: Tensor | None, window: int | None, device: torch.device
) -> BlockMask:
    """Causal visibility within documents and window, made once a step and shared by all layers."""
    query = torch.arange(n_tokens, device=device)
    document = torch.zeros_like(query) if cu_seqlens is None else torch.searchsorted(cu_seqlens, query, right=True)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = (j <= i) & (document[i] == document[j])
        return seen if window is None else seen & (j > i - window)

    return create_block_mask(visible, None, None, n_tokens, n_tokens, device=device, _compile=True)


def _alibi_score_mod(slopes: Tensor) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - slopes[h] * (i - j)

    return score_mod


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: int | None) -> Tensor:
    packed_q, packed_k, packed_v = (x[0].transpose(0, 1) for x in (q, k, v))  # [T, H, D]
    left = -1 if window is None else window - 1
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    out = varlen_attn(packed_q, packed_k, packed_v, *lengths, window_size=(left, 0), **VARLEN_GQA)
    assert isinstance(out, Tensor)
    return out.transpose(0, 1)[None]


def _dense(q: Tensor, k: Tensor, v: Tensor, alibi_slopes: Tensor | None, window: int | None) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    if alibi_slopes is None and window is None:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    n_tokens = q.shape[2]
    rows = max(64, MASK_ELEMENTS // (q.shape[1] * n_tokens))
    parts = []
    for start in range(0, n_tokens, rows):
        stop = min(start + rows, n_tokens)
        first = 0 if window is None else max(0, start - window + 1)
        distance = torch.arange(start, stop, device=q.device)[:, None] - torch.arange(first, stop, device=q.device)
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        slopes = torch.zeros(1, device=q.device) if alibi_slopes is None else alibi_slopes
        bias = (-slopes[:, None, None] * distance).masked_fill_(hidden, -torch.inf).to(q.dtype)
        keys = slice(first, stop)
        parts.append(
            scaled_dot_product_attention(
                q[:, :, start:stop], k[:, :, keys], v[:, :, keys], attn_mask=bias, enable_gqa=gqa
            )
        )
    return torch.cat(parts, dim=2)
