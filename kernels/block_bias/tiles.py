"""Device functions of attention with a bias for each block: queries of a tile, their documents, scores, readers."""

import triton
import triton.language as tl

from kernels.block_sparse.passes import append_blocks
from kernels.common.tiles import add_position_bias, head_offset

# arguments that vary with the input's length: Triton shall not compile for their values
LENGTHS = ["n_queries", "n_keys", "n_tiles", "n_blocks", "stride_row"]
FAR = tl.constexpr(2**31 - 1)  # behind every key
BIASES = tl.constexpr(32)  # of a row, looked at at once where none of its scores is a number
BOUNDS = 3  # of a tile of queries: first key of its documents, last key that is seen, 1 where documents differ


@triton.jit
def load_queries(p_first, p_own, i_batch, i_tile, stride_row, n_queries, n_keys, BM: tl.constexpr):
    """Queries of a tile, each [BM]: numbers, first key of their documents and last key that they see (the one before
    where they see none; whatever stands in memory, both are keys)."""
    row = i_tile * BM + tl.arange(0, BM)
    inside = row < n_queries
    first = tl.load(p_first + i_batch * stride_row + row, mask=inside, other=0)
    own = tl.load(p_own + i_batch * stride_row + row, mask=inside, other=-1)
    first = tl.maximum(first, 0)
    return row, first, tl.maximum(tl.minimum(own, n_keys - 1), first - 1)


@triton.jit
def count_documents(first):
    """How often the first key is another one than the query before has, and 1: at least as many as first keys."""
    BM: tl.constexpr = first.shape[0]
    here = tl.arange(0, BM)
    before = tl.sum(tl.where(here[:, None] == here[None, :] + 1, first[None, :], 0), 1)
    return tl.sum(((here == 0) | (before != first)).to(tl.int32), 0)


@triton.jit
def next_document(first, own, before):
    """Of a tile's documents the one that begins next behind key `before`: its first key; the last key that each query
    sees of it, [BM], -1 where none; one behind the last that any sees (0 without such a document)."""
    start = tl.min(tl.where((own >= first) & (first > before), first, FAR), 0)
    last = tl.where((own >= first) & (first == start), own, -1)
    return start, last, tl.max(last, 0) + 1


@triton.jit
def biased_scores(
    q, k, bias, key, start, own, last, slope, SLOPES: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Raw scores (bias in the same units) with keys of one block, -inf where a query does not read a key. q: [BM, BD],
    k: [BN, BD], bias, own: [BM], key: [BN]. start: a key that distances are counted from. last: [BM], of the block."""
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if SLOPES:
        x = add_position_bias(x, own[:, None], key[None, :], start, slope)
    last = tl.where(bias == float("-inf"), -1, last)
    return tl.where(key[None, :] <= last[:, None], x + bias[:, None], float("-inf"))


@triton.jit
def bias_of_keys(p_rows, key, key_start, first, own, n_blocks, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """[BM, BN]: the bias of queries and keys that may stand in COLUMNS blocks of a query, -inf where a query sees no
    such key. p_rows: [BM], where a query's row of the bias begins. key: [BN], from key_start on."""
    column = tl.maximum(key_start - first, 0) // SIZE  # the block of the first key that may be seen
    sees = own >= key_start
    found = tl.load(p_rows + column, mask=sees & (column < n_blocks), other=float("-inf"))[:, None]
    found = tl.broadcast_to(found, (first.shape[0], key.shape[0]))
    for step in tl.static_range(1, COLUMNS):
        further = column + step
        value = tl.load(p_rows + further, mask=sees & (further < n_blocks), other=float("-inf"))
        found = tl.where(key[None, :] >= (first + further * SIZE)[:, None], value[:, None], found)
    return tl.where((key[None, :] >= first[:, None]) & (key[None, :] <= own[:, None]), found, float("-inf"))


@triton.jit
def list_reading_tiles(
    p_list, count, entry, p_live, p_bounds, key_start, n_tiles, n_blocks,
    SIZE: tl.constexpr, BN: tl.constexpr, COLUMNS: tl.constexpr, BOUNDS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Appends to the list, which has `count` entries, `entry` + number of the tiles of queries that may read one of BN
    keys from key_start on; returns its length. p_live, p_bounds: as `mark_live_blocks` leaves them, of a head and a
    batch row. Of a tile with queries of several documents, what is live is not looked at."""
    for start in range(0, n_tiles, CHUNK):
        tile = start + tl.arange(0, CHUNK)
        there = tile < n_tiles
        first = tl.load(p_bounds + tile * BOUNDS, mask=there, other=0)
        last = tl.load(p_bounds + tile * BOUNDS + 1, mask=there, other=-1)
        live = tl.load(p_bounds + tile * BOUNDS + 2, mask=there, other=0)
        sees = (first < key_start + BN) & (last >= key_start)
        column = tl.maximum(key_start - first, 0) // SIZE
        for step in tl.static_range(COLUMNS):
            mask = sees & (column + step < n_blocks)
            live |= tl.load(p_live + tile * n_blocks + column + step, mask=mask, other=0).to(tl.int32)
        count = append_blocks(p_list, count, entry + tile, (sees & (live != 0)).to(tl.int32))
    return count


@triton.jit
def head_slope(p_slopes, i_head, scale, SLOPES: tl.constexpr):
    """ALiBi slope of a head in units of q k, 0 without SLOPES."""
    slope = 0.0
    if SLOPES:
        slope = tl.load(p_slopes + i_head) / scale
    return slope


@triton.jit
def bias_rows(p_bias, i_batch, i_head, row, stride_b, stride_h, stride_t):
    """[BM]: where rows of a tensor (B, H, n, C) begin."""
    return p_bias + head_offset(i_batch, i_head, stride_b, stride_h) + row.to(tl.int64) * stride_t
