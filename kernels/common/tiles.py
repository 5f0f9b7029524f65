"""What the Triton passes share: which keys each row sees, lists of tiles, scores of one tile.

Everything works in tiles of TILE queries x TILE keys. A tile is *inner* when all its rows see all its keys, else an
*edge*: only edges pay for masks. Rows that see no key, and rows past the last query, have the threshold +inf.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from kernels.common.visibility import TILE

# whether device functions may use the GPU's own instructions (libdevice), which the interpreter has not
INTRINSICS = tl.constexpr(not triton.knobs.runtime.interpret)

# arguments that vary with the input's length: Triton shall not compile for their values
LENGTHS = ["n_queries", "n_keys", "n_tasks", "n_blocks", "n_key_blocks", "n_words", "capacity", "batch_step"]
LENGTHS += [
    "n_items",
    "n_key_words",
    "triangular",
    "key_capacity",
    "stride_key_bits",
    "stride_row_bits",
    "stride_rows",
    "stride_last",
    "n_documents",
    "search_steps",
    "window",
]
LIST_CHUNK = 512  # tiles examined at once when a list is built
BLOCK_FIELDS = 5  # of key_intervals' blocks: tile_lo, tile_hi, inner_lo, inner_hi, position of query 0


@dataclass(frozen=True)
class Intervals:
    """Device copy of `visibility.VisibleKeys`, for the kernels.

    rows: int32 (2, B or 1, Tq), first and end of each query's keys, both 0 where it sees none. blocks: int32 (B or 1,
    query tiles, 5): tiles [lo, hi) that any row of the block sees, tiles [lo, hi) that all rows see whole, position
    of query 0.
    """

    rows: Tensor
    blocks: Tensor


@triton.jit
def tile_range(first, end, sees, SIZE: tl.constexpr):
    """Intervals of the keys that a block of rows sees, in tiles of SIZE: [lo, hi) that any row sees, [lo, hi) that all
    rows which see anything see whole."""
    far = 2147483647
    tile_hi = (tl.max(end, 0) + SIZE - 1) // SIZE
    tile_lo = tl.minimum(tl.min(tl.where(sees, first, far), 0) // SIZE, tile_hi)
    inner_lo = (tl.max(first, 0) + SIZE - 1) // SIZE
    inner_hi = tl.minimum(tl.min(tl.where(sees, end, far), 0) // SIZE, tile_hi)
    none = inner_lo >= inner_hi
    return tile_lo, tile_hi, tl.where(none, tile_lo, inner_lo), tl.where(none, tile_lo, inner_hi)


@triton.jit
def query_task(
    task, p_rows, p_blocks, heads, n_queries, n_blocks, batch_step, stride_rows, BM: tl.constexpr, FIELDS: tl.constexpr
):  # fmt: skip
    """Which query tile a task is: long ones come first within a head.

    Returns i_bh, i_batch, i_head, i_block; its rows, which of them are queries, their positions, first and end of their
    keys, each [BM]; and where its fields of key_intervals' blocks stand."""
    i_bh, i_block = task // n_blocks, n_blocks - 1 - task % n_blocks
    i_batch, i_head = i_bh // heads, i_bh % heads
    row = i_block * BM + tl.arange(0, BM)
    inside = row < n_queries
    p_block = p_blocks + (i_batch * batch_step * n_blocks + i_block) * FIELDS
    position = row + tl.load(p_block + 4)
    o_row = i_batch * batch_step * n_queries + row
    first = tl.load(p_rows + o_row, mask=inside, other=0)
    end = tl.load(p_rows + stride_rows + o_row, mask=inside, other=0)
    return i_bh, i_batch, i_head, i_block, row, inside, position, first, end, p_block


@triton.jit
def head_scales(p_alpha, p_slopes, i_head, scale, BIAS: tl.constexpr):
    """alpha, beta, the factor from q k to z, and the ALiBi slope in units of q k (0 without BIAS) of a head."""
    alpha = tl.load(p_alpha + i_head)
    slope = 0.0
    if BIAS:
        slope = tl.load(p_slopes + i_head) / scale
    return alpha, 1 / (alpha - 1), (alpha - 1) * scale, slope


@triton.jit
def head_offset(i_batch, i_head, stride_b, stride_h):
    """Elements before a head of a tensor (B, H, T, D)."""
    return i_batch.to(tl.int64) * stride_b + i_head.to(tl.int64) * stride_h


@triton.jit(do_not_specialize=LENGTHS)
def key_intervals(
    p_cu_seqlens,
    p_kv_lens,
    p_rows,
    p_blocks,
    n_queries,
    n_keys,
    n_documents,
    search_steps,
    window,
    CAUSAL: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    KEY_LENGTHS: tl.constexpr,
    WINDOW: tl.constexpr,
    BM: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """One program per (query tile, batch row). The rules are those of `visibility.visible_keys`, and no interval leaves
    0 ... n_keys, whatever the lengths say: on a device nobody has looked at them."""
    i_block, i_batch, n_blocks, n_batch = tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1)
    query = i_block * BM + tl.arange(0, BM)
    inside = query < n_queries
    start = tl.zeros([BM], tl.int32)
    if DOCUMENTS:
        lo, hi = tl.zeros([BM], tl.int32), tl.full([BM], 0, tl.int32) + (n_documents - 1)
        for _ in range(search_steps):  # last document that starts at or before the query
            middle = (lo + hi + 1) // 2
            before = tl.load(p_cu_seqlens + middle, mask=inside, other=0) <= query
            lo, hi = tl.where(before, middle, lo), tl.where(before, hi, middle - 1)
        start = tl.load(p_cu_seqlens + lo, mask=inside, other=0)
        stop = tl.load(p_cu_seqlens + lo + 1, mask=inside, other=0)
        start, stop = tl.maximum(start, 0), tl.minimum(stop, n_keys)
        offset = 0
    else:
        length = n_keys
        if KEY_LENGTHS:
            length = tl.minimum(tl.maximum(tl.load(p_kv_lens + i_batch), 0), n_keys)
        stop = tl.zeros([BM], tl.int32) + length
        offset = length - n_queries
    position = query + offset
    end, first = stop, start
    if CAUSAL:
        end = tl.minimum(position + 1, stop)
    if WINDOW:
        first = tl.maximum(start, position - window + 1)
    sees = inside & (first < end)
    first, end = tl.where(sees, first, 0), tl.where(sees, end, 0)
    tl.store(p_rows + i_batch * n_queries + query, first, mask=inside)
    tl.store(p_rows + (n_batch + i_batch) * n_queries + query, end, mask=inside)
    tile_lo, tile_hi, inner_lo, inner_hi = tile_range(first, end, sees, BM)
    p_block = p_blocks + (i_batch * n_blocks + i_block) * FIELDS
    tl.store(p_block, tile_lo)
    tl.store(p_block + 1, tile_hi)
    tl.store(p_block + 2, inner_lo)
    tl.store(p_block + 3, inner_hi)
    tl.store(p_block + 4, offset)


def write_intervals(
    intervals: Intervals,
    n_keys: int,
    causal: bool,
    cu_seqlens: Tensor | None,
    kv_lens: Tensor | None,
    window: int | None,
) -> None:
    """Fills the intervals without reading from the device. Arguments as in `kernels.entmax_attention`."""
    _, batch, n_queries = intervals.rows.shape
    n_documents = 0 if cu_seqlens is None else len(cu_seqlens) - 1
    key_intervals[(intervals.blocks.shape[1], batch)](
        p_cu_seqlens=cu_seqlens,
        p_kv_lens=kv_lens,
        p_rows=intervals.rows,
        p_blocks=intervals.blocks,
        n_queries=n_queries,
        n_keys=n_keys,
        n_documents=n_documents,
        search_steps=(n_documents + 1).bit_length(),
        window=window or 0,
        CAUSAL=causal,
        DOCUMENTS=cu_seqlens is not None,
        KEY_LENGTHS=kv_lens is not None,
        WINDOW=window is not None,
        BM=TILE,
        FIELDS=BLOCK_FIELDS,
        num_warps=2,
    )


@triton.jit
def load_rows(p, start, stride, n_rows, ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr):
    """[ROWS, BD] of a (tokens, D) matrix from row `start`; 0 past n_rows (if MASKED) and past D."""
    row, dim = tl.arange(0, ROWS), tl.arange(0, BD)
    pointers = p + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + dim[None, :])
    if MASKED:
        mask = (start + row < n_rows)[:, None]
        if D != BD:
            mask = mask & (dim < D)[None, :]
        return tl.load(pointers, mask=mask, other=0.0)
    elif D != BD:
        return tl.load(pointers, mask=(dim < D)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_rows(p, value, start, stride, n_rows, ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Stores [ROWS, BD] into a (tokens, D) matrix from row `start`."""
    row, dim = tl.arange(0, ROWS), tl.arange(0, BD)
    mask = (start + row < n_rows)[:, None] & (dim < D)[None, :]
    pointers = p + start.to(tl.int64) * stride + (row[:, None] * stride + dim[None, :])
    tl.store(pointers, value.to(p.dtype.element_ty), mask=mask)


@triton.jit
def add_position_bias(x, query_position, key, anchor, slope):
    """x - slope * (query position - key). Distances to an anchor key of the tile are whole numbers in float32, so that
    only their product with the slope rounds; converting them is work for rows and columns, not for pairs.

    query_position, key: int32, broadcastable against x.
    """
    return x - slope * ((query_position - anchor).to(tl.float32) - (key - anchor).to(tl.float32))


@triton.jit
def append_entries(p_list, index, live, inner, n_inner, n_edge, capacity):
    """Appends the live ones of `index` to a list of tiles: inner ones from its front, edges from its back. Counts go on
    where it is full."""
    count = (live & inner).to(tl.int32) + ((live & ~inner).to(tl.int32) << 16)
    before = tl.cumsum(count, 0) - count
    slot = tl.where(inner, n_inner + (before & 0xFFFF), capacity - 1 - n_edge - (before >> 16))
    tl.store(p_list + slot, index, mask=live & (slot >= 0) & (slot < capacity))
    total = tl.sum(count, 0)
    return n_inner + (total & 0xFFFF), n_edge + (total >> 16)


@triton.jit
def list_row_tiles(p_bits, p_list, lo, hi, inner_lo, inner_hi, capacity, CHUNK: tl.constexpr):
    """Lists the live key tiles of one query tile, of [lo, hi), from its bit mask. Returns how many are inner, how many
    edges."""
    n_inner, n_edge = 0, 0
    for start in range(lo, hi, CHUNK):
        entry = start + tl.arange(0, CHUNK)
        word = tl.load(p_bits + entry // 32, mask=entry < hi, other=0)
        live = ((word >> (entry % 32)) & 1) != 0
        inner = (entry >= inner_lo) & (entry < inner_hi)
        n_inner, n_edge = append_entries(p_list, entry, live & (entry < hi), inner, n_inner, n_edge, capacity)
    tl.debug_barrier()  # the whole program reads the list next
    return n_inner, n_edge


@triton.jit
def store_live_bits(
    p_flags, p_bits, tile_lo, tile_hi, n_words, every, p_count, COUNT: tl.constexpr, CHUNK: tl.constexpr
):
    """Packs the flags of one query tile to one bit a key tile (all in range if `every`), clears them, counts them (if
    COUNT). Barriers before and after are the caller's."""
    for start in range(0, n_words, CHUNK // 32):
        word = start + tl.arange(0, CHUNK // 32)
        tile = word[:, None] * 32 + tl.arange(0, 32)[None, :]
        inside = (tile >= tile_lo) & (tile < tile_hi)
        live = (tl.load(p_flags + tile, mask=inside, other=0) != 0) | (inside & every)
        tl.store(p_flags + tile, 0, mask=inside)
        tl.store(p_bits + word, tl.sum(live.to(tl.int32) << (tile % 32), 1), mask=word < n_words)
        if COUNT:
            tl.atomic_add(p_count, tl.sum(tl.sum(live.to(tl.int64), 1), 0))  # integers: any order gives the same


@triton.jit
def bit_or(a, b):
    return a | b


@triton.jit
def nan_maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def seen_dot(w, seen, x, out, PRECISION: tl.constexpr):
    """out + w @ x, where w [rows, K] is 0 if not seen [rows, K]: what is not finite in x [K, columns] makes NaN of the
    rows that see it, and reaches no other, which a product with 0 would."""
    finite = tl.abs(x.to(tl.float32)) < float("inf")
    out = tl.dot(w, tl.where(finite, x, 0.0), out, input_precision=PRECISION)
    if tl.min(tl.min(finite.to(tl.int32), 1), 0) == 0:
        found = tl.dot(seen.to(tl.float32), tl.where(finite, 0.0, 1.0), input_precision=PRECISION)
        out = tl.where(found > 0, float("nan"), out)
    return out


@triton.jit
def mark_listed(p_marks, marks, live, n, count, PARTS: tl.constexpr):
    """Sets the bit of entry n // PARTS, the one that step n is a part of, where `live` holds for any row; every 32 bits
    become a word in memory. count: of steps.

    marks, live: [rows]. Marks stay in registers in between: a store in every step would synchronise warps.
    """
    marks |= live.to(tl.int32) << (n // PARTS % 32)
    if (n % (32 * PARTS) == 32 * PARTS - 1) | (n == count - 1):
        tl.store(p_marks + n // PARTS // 32, tl.reduce(marks, 0, bit_or))
        marks = tl.zeros_like(marks)
    return marks


@triton.jit
def keep_marked(p_list, list_step, p_marks, count, CHUNK: tl.constexpr):
    """Compacts a list to its marked entries, in order. Returns how many are left."""
    tl.debug_barrier()  # all warps have written their marks
    kept = 0
    for start in range(0, count, CHUNK):
        n = start + tl.arange(0, CHUNK)
        tile = tl.load(p_list + n * list_step, mask=n < count, other=0)
        word = tl.load(p_marks + n // 32, mask=n < count, other=0)
        marked = (word >> (n % 32)) & 1
        tl.debug_barrier()  # entries move forward within the same memory
        slot = kept + tl.cumsum(marked, 0) - marked
        tl.store(p_list + slot * list_step, tile, mask=marked != 0)
        kept += tl.sum(marked, 0)
        tl.debug_barrier()
    return kept


@triton.jit
def flag_listed(p_list, list_step, p_flags, count, CHUNK: tl.constexpr):
    """Sets the flag of every listed tile."""
    for start in range(0, count, CHUNK):
        n = start + tl.arange(0, CHUNK)
        tile = tl.load(p_list + n * list_step, mask=n < count, other=0)
        tl.store(p_flags + tile, 1, mask=n < count)


@triton.jit
def is_visible(key, first, end):
    """Whether first <= key < end, broadcast: one comparison of unsigned numbers. end >= first."""
    return (key - first).to(tl.uint32, bitcast=True) < (end - first).to(tl.uint32, bitcast=True)


@triton.jit
def tile_scores(
    q, k, tile, slope, first, end, position, BM: tl.constexpr,
    BIAS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Raw scores (bias in the same units) of one tile of BM keys, -inf where invisible. q: [rows, BD], k: [BM, BD]."""
    key = tile * BM + tl.arange(0, BM)
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if BIAS:
        x = add_position_bias(x, position[:, None], key[None, :], tile * BM, slope)
    if MASKED:
        x = tl.where(is_visible(key[None, :], first[:, None], end[:, None]), x, float("-inf"))
    return x


@triton.jit
def listed_scores(
    q, p_k, stride_k, tile, slope, first, end, position, n_keys,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    BIAS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """tile_scores of a tile of keys in memory."""
    k = load_rows(p_k, tile * BM, stride_k, n_keys, BM, D, BD, MASKED)
    return tile_scores(q, k, tile, slope, first, end, position, BM, BIAS, MASKED, PRECISION)
