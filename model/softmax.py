"""Softmax attention for the twins, by the fastest library path of each case."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from model import flash_attention
from model.block_masks import block_mask_of_intervals
from model.compiling import share_cores
from model.kv_cache import Extension

# torch 2.11 takes grouped heads as they are, later releases want to be told
VARLEN_GQA: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
HALF = (torch.bfloat16, torch.float16)  # what FlashAttention takes
FLEX_KINDS = 256  # of inputs (dtype, heads, head dim, gradients or not, ...) for which one process compiles it
FLEX_SCORES = 2**18  # scores of a head below which a mask costs less than compiling FlexAttention
# without cuDNN's, which plans anew for each number of keys, and so for each decoded token
CACHED_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# of one query with a mask on CUDA: the kernel that takes masks does not split a row's keys over the GPU, plain products
# do, on a copy in float32
ONE_QUERY_BACKENDS = [SDPBackend.MATH]
# what computes the output on each path, but for plain products (SDPBackend.MATH)
SOFTMAX_OPERATORS: tuple[Any, ...] = (
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops.aten._flash_attention_forward.default,
    torch.ops.higher_order.flex_attention,
)
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
    half-precision documents, scaled_dot_product_attention otherwise; FlashAttention-4 in place of the last two in
    training where it is installed (model/flash_attention.py). CPU: scaled_dot_product_attention per document.

    Args:
        max_seqlen: an upper bound of the documents' lengths.
        block_mask: from `document_block_mask`, where `uses_flex` says so.
    """
    if q.is_cuda and uses_flex(q.device, cu_seqlens, alibi_slopes, window):
        score_mod = None if alibi_slopes is None else _alibi_score_mod(alibi_slopes)
        flex: Any = flex_attention if torch.compiler.is_compiling() else compiled_flex()
        return flex(q, k, v, score_mod=score_mod, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])
    if q.is_cuda and cu_seqlens is not None and q.dtype in HALF:
        return _varlen(q, k, v, cu_seqlens, max_seqlen, window)
    if cu_seqlens is None:
        return _dense(q, k, v, alibi_slopes, window)
    if q.is_cuda:
        return _in_batches(q, k, v, cu_seqlens, alibi_slopes, window)
    bounds = cu_seqlens.tolist()
    parts = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        if stop > start:
            document = slice(start, stop)
            parts.append(_dense(q[:, :, document], k[:, :, document], v[:, :, document], alibi_slopes, window))
    return torch.cat(parts, dim=2)


def _in_batches(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, alibi_slopes: Tensor | None, window: int | None
) -> Tensor:
    """Documents of similar length (up to twice) as the padded rows of one call: one by one, hundreds of short ones take
    the host longer to launch than the GPU to run."""
    bounds = cu_seqlens.tolist()
    batches: dict[int, list[int]] = {}
    for start, stop in zip(bounds, bounds[1:], strict=False):
        if stop > start:
            batches.setdefault((stop - start - 1).bit_length(), []).extend((start, stop))
    parts, order = [], []
    for ends in batches.values():
        starts, stops = torch.tensor(ends, device=q.device).view(-1, 2).unbind(1)
        longest = max(stop - start for start, stop in zip(ends[::2], ends[1::2], strict=True))
        token = starts[:, None] + torch.arange(longest, device=q.device)  # [documents, longest]
        real = token < stops[:, None]
        rows = token.clamp(max=q.shape[2] - 1)
        # what pads a row stands behind its tokens, which do not see it
        padded_q, padded_k, padded_v = (x[0][:, rows].transpose(0, 1) for x in (q, k, v))
        out = _dense(padded_q, padded_k, padded_v, alibi_slopes, window)
        parts.append(out.transpose(0, 1)[:, real])
        order.append(token[real])
    return torch.cat(parts, dim=1)[:, torch.cat(order).argsort()][None]


def uses_flex(device: torch.device, cu_seqlens: Tensor | None, alibi_slopes: Tensor | None, window: int | None) -> bool:
    """Whether softmax_attention needs a block mask for this case."""
    return device.type == "cuda" and (alibi_slopes is not None or (window is not None and cu_seqlens is None))


def document_block_mask(
    n_tokens: int, cu_seqlens: Tensor | None, window: int | None, device: torch.device
) -> BlockMask:
    """Causal visibility within documents and window, made once a step and shared by all layers."""
    query = torch.arange(n_tokens, device=device)
    document = first = torch.zeros_like(query)
    if cu_seqlens is not None:
        document = torch.searchsorted(cu_seqlens, query, right=True)
        first = cu_seqlens[document - 1].long()
    if window is not None:
        first = torch.maximum(first, query - window + 1)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = (j <= i) & (document[i] == document[j])
        return seen if window is None else seen & (j > i - window)

    return block_mask_of_intervals(visible, first[None], query[None], n_tokens)


def cached_softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    extension: Extension,
    alibi_slopes: Tensor | None,
    window: int | None,
    block_mask: BlockMask | None,
) -> Tensor:
    """Softmax attention of tokens that continue the rows of a cache. q: (b, H, n, D), k and v: (b, G, keys, D).

    scaled_dot_product_attention: without a mask for one token of rows of one length and for first chunks, if there is
    no ALiBi; on CUDA for later chunks too, if there is no window; else with a mask, for as many tokens at a time as
    keep that small. On CUDA FlexAttention takes long chunks with ALiBi or a window where rows are of one length
    (`cached_uses_flex`).

    Args:
        block_mask: from `cached_block_mask`.
    """
    n_queries, n_keys, grouped = q.shape[2], k.shape[2], q.shape[1] != k.shape[1]
    if alibi_slopes is None and extension.slots is not None:
        if n_queries == 1:  # a window has cut the keys already
            with sdpa_kernel(steady_backends(q, masked=False)):
                return scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
        if n_queries == n_keys and window is None:
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        if q.is_cuda and window is None:
            return _last_queries(q, k, v)
    if block_mask is not None:
        score_mod = None if alibi_slopes is None else _alibi_score_mod(alibi_slopes, extension.key_index[0])
        return compiled_flex()(q, k, v, score_mod=score_mod, block_mask=block_mask, enable_gqa=grouped)
    return _masked(q, k, v, extension, alibi_slopes, window)


def _last_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention whose last query stands at the last key: FlashAttention for half precision on CUDA, the
    memory-efficient kernel for float32. FlexAttention would be compiled for each number of keys, for minutes.

    On a CPU torch makes a mask of all scores here. Shapes as of cached_softmax_attention.
    """
    repeat = q.shape[1] // k.shape[1]
    if q.dtype not in HALF:  # only FlashAttention reads a group's keys in place
        k, v, repeat = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1), 1
    bias = causal_lower_right(1, 1)  # it would allocate 2 * queries * keys values that nothing reads
    bias.seq_len_q, bias.seq_len_kv = q.shape[2], k.shape[2]
    return scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=repeat > 1)


def steady_backends(q: Tensor, masked: bool) -> list[SDPBackend]:
    """What scaled_dot_product_attention may take for queries (..., n, D) whose number of keys changes from call to
    call, as in decoding. masked: with attn_mask."""
    return ONE_QUERY_BACKENDS if masked and q.is_cuda and q.shape[-2] == 1 else CACHED_BACKENDS


def cached_uses_flex(extension: Extension, alibi_slopes: Tensor | None, window: int | None) -> bool:
    """Whether cached_softmax_attention needs a block mask for this case."""
    n_queries, n_keys = extension.position.shape[1], extension.keys.stop - extension.keys.start
    plain = alibi_slopes is None and window is None
    long = n_queries > 1 and n_queries * n_keys > FLEX_SCORES
    return extension.position.is_cuda and extension.slots is not None and long and not plain


def cached_block_mask(extension: Extension, window: int | None) -> BlockMask:
    """Visibility of cached keys, made once a forward pass and shared by all layers."""
    query, n_keys = extension.key_index[0], extension.keys.stop - extension.keys.start

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j <= query[i]
        return seen if window is None else seen & (j > query[i] - window)

    first = torch.zeros_like(query) if window is None else (query - window + 1).clamp(min=0)
    return block_mask_of_intervals(visible, first[None], query[None], n_keys)


def _masked(
    q: Tensor, k: Tensor, v: Tensor, extension: Extension, alibi_slopes: Tensor | None, window: int | None
) -> Tensor:
    n_queries, n_keys, groups = q.shape[2], k.shape[2], k.shape[1]
    repeat = q.shape[1] // groups
    query = extension.key_index[:, None]  # [b or 1, 1, n]
    mask_groups = 1 if alibi_slopes is None else groups

    def share(x: Tensor, groups: int) -> Tensor:
        """(b, groups * repeat, rows, ...) -> (b, groups, repeat * rows, ...): kernels that take masks want as many
        query heads as key heads."""
        return x.unflatten(1, (groups, repeat)).flatten(2, 3)

    rows = max(1, MASK_ELEMENTS // (query.shape[0] * mask_groups * repeat * n_keys))
    parts = []
    for start in range(0, n_queries, rows):
        stop = min(start + rows, n_queries)
        first, end = 0, n_keys
        if extension.slots is not None:  # rows of one length: no token of this part sees other keys
            end = n_keys - n_queries + stop
            first = 0 if window is None else max(0, end - (stop - start) - window + 1)
        key = torch.arange(first, end, device=q.device)
        bias = _score_bias(query[..., start:stop], key, alibi_slopes, window, q.dtype)  # [b or 1, H or 1, rows, keys]
        bias = share(bias.expand(-1, mask_groups * repeat, -1, -1), mask_groups)
        part = share(q[:, :, start:stop], groups)
        with sdpa_kernel(steady_backends(q, masked=True)):
            part = scaled_dot_product_attention(part, k[:, :, first:end], v[:, :, first:end], attn_mask=bias)
        parts.append(part.unflatten(2, (repeat, -1)).flatten(1, 2))
    return torch.cat(parts, dim=2)


def _score_bias(query: Tensor, key: Tensor, slopes: Tensor | None, window: int | None, dtype: torch.dtype) -> Tensor:
    """What is added to the scores, -inf for keys that are not visible. query: (..., rows), key: (keys,), positions in
    one count. Returns (H or 1, rows, keys), or (b, H or 1, rows, keys) for query (b, 1, rows)."""
    distance = query[..., None] - key
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    slopes = torch.zeros(1, device=query.device) if slopes is None else slopes
    return (-slopes[:, None, None] * distance).masked_fill_(hidden, -torch.inf).to(dtype)


def _alibi_score_mod(slopes: Tensor, query: Tensor | None = None) -> Callable[..., Tensor]:
    """query: (n,), the key that each query stands at; None where query i stands at key i."""

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - slopes[h] * ((i if query is None else query[i]) - j)

    return score_mod


@functools.cache
def compiled_flex() -> Callable[..., Any]:
    """FlexAttention, compiled for each kind of input that a process meets: past torch's limit of 8 it would compute all
    scores, without a word."""
    share_cores(1)
    compiled = torch.compile(flex_attention, fullgraph=True)  # an error past the limit

    def attend(*args: Any, **options: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=FLEX_KINDS):
            return compiled(*args, **options)

    return attend


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: int | None) -> Tensor:
    packed_q, packed_k, packed_v = (x[0].transpose(0, 1) for x in (q, k, v))  # [T, H, D]
    if flash_attention.is_active() and window is None:
        return flash_attention.packed(packed_q, packed_k, packed_v, cu_seqlens, max_seqlen).transpose(0, 1)[None]
    left = -1 if window is None else window - 1
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    out = varlen_attn(packed_q, packed_k, packed_v, *lengths, window_size=(left, 0), **VARLEN_GQA)
    assert isinstance(out, Tensor)
    return out.transpose(0, 1)[None]


def _dense(q: Tensor, k: Tensor, v: Tensor, alibi_slopes: Tensor | None, window: int | None) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    if alibi_slopes is None and window is None:
        if flash_attention.is_active() and q.dtype in HALF:
            return flash_attention.dense(q, k, v)
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    n_tokens = q.shape[2]
    rows = max(64, MASK_ELEMENTS // (q.shape[1] * n_tokens))
    parts = []
    for start in range(0, n_tokens, rows):
        stop = min(start + rows, n_tokens)
        first = 0 if window is None else max(0, start - window + 1)
        query, key = torch.arange(start, stop, device=q.device), torch.arange(first, stop, device=q.device)
        bias = _score_bias(query, key, alibi_slopes, window, q.dtype)
        keys = slice(first, stop)
        parts.append(
            scaled_dot_product_attention(
                q[:, :, start:stop], k[:, :, keys], v[:, :, keys], attn_mask=bias, enable_gqa=gqa
            )
        )
    return torch.cat(parts, dim=2)
