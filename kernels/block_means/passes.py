"""The Triton passes: running means within blocks, queries' scores with them, and their gradients. Products are of
float32."""

import triton
import triton.language as tl

from kernels.block_bias.tiles import FAR, count_documents, head_slope, load_queries, next_document
from kernels.common.tiles import add_position_bias, head_offset, load_rows, seen_dot, store_rows

# arguments that vary with the input's length: Triton shall not compile for their values
LENGTHS = ["n_queries", "n_keys", "n_blocks", "n_ends", "stride_row"]


@triton.jit(do_not_specialize=LENGTHS)
def running_means(
    p_x, p_start, p_out, stride_xb, stride_xh, stride_xt, stride_ob, stride_oh, stride_ot, groups, n_keys,
    SIZE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    """One program a tile of BN keys and key head: of each key the mean of its block's keys up to it; BACKWARD: of each
    key the gradient, from that of these means. Products with a matrix of 0 and 1, so that a key's sum is over its block
    alone. x: (B, G, keys, D). p_start: int32 (keys,), the first key of each key's block."""
    i_tile, i_bg = tl.program_id(0), tl.program_id(1)
    i_batch, i_group = i_bg // groups, i_bg % groups
    key = i_tile * BN + tl.arange(0, BN)
    start = tl.load(p_start + key, mask=key < n_keys, other=FAR)
    p_x += head_offset(i_batch, i_group, stride_xb, stride_xh)
    out = tl.zeros([BN, BD], tl.float32)
    TILES: tl.constexpr = (SIZE + BN - 2) // BN + 1  # that may hold keys of one block up to, or from, any key
    for step in range(0, TILES if BACKWARD else tl.minimum(TILES, i_tile + 1)):
        other_start = (i_tile + step if BACKWARD else i_tile - step) * BN
        other = other_start + tl.arange(0, BN)
        x = load_rows(p_x, other_start, stride_xt, n_keys, BN, D, BD, True)
        if BACKWARD:
            begin = tl.load(p_start + other, mask=other < n_keys, other=FAR)
            x = x / tl.maximum(other - begin + 1, 1).to(tl.float32)[:, None]
            belongs = (other[None, :] >= key[:, None]) & (begin[None, :] <= key[:, None])
        else:
            belongs = (other[None, :] <= key[:, None]) & (other[None, :] >= start[:, None])
        out = seen_dot(belongs.to(x.dtype), belongs, x, out, PRECISION)
    if not BACKWARD:
        out = out / tl.maximum(key - start + 1, 1).to(tl.float32)[:, None]
    p_out += head_offset(i_batch, i_group, stride_ob, stride_oh)
    store_rows(p_out, out, i_tile * BN, stride_ot, n_keys, BN, D, BD)


@triton.jit
def load_means(p_means, key, mask, D: tl.constexpr, BD: tl.constexpr):
    """[rows, BD] of running means of one head, contiguous, of keys [rows]; 0 where not mask."""
    dim = tl.arange(0, BD)
    pointers = p_means + key.to(tl.int64)[:, None] * D + dim[None, :]
    return tl.load(pointers, mask=mask[:, None] & (dim < D)[None, :], other=0.0)


@triton.jit
def own_blocks(first, own, n_blocks, SIZE: tl.constexpr):
    """Which block is a query's own, [BM], -1 where it sees no key, and whether it is one of n_blocks."""
    block = tl.where(own >= first, (own - first) // SIZE, -1)
    return block, (block >= 0) & (block < n_blocks)


@triton.jit(do_not_specialize=LENGTHS)
def score_means(
    p_q, p_means, p_first, p_own, p_slopes, p_scores, stride_qb, stride_qh, stride_qt, stride_row,
    scale, heads, repeat, n_queries, n_keys, n_blocks,
    SIZE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SLOPES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a tile of queries and head: a loop over its documents, mostly one, and over their full blocks.

    p_means: float32 (B, G, keys, D). p_scores: float32 (B, H, n, C), filled with -inf."""
    i_tile, i_bh = tl.program_id(0), tl.program_id(1)
    i_batch, i_head = i_bh // heads, i_bh % heads
    row, first, own = load_queries(p_first, p_own, i_batch, i_tile, stride_row, n_queries, n_keys, BM)
    own_block, inside = own_blocks(first, own, n_blocks, SIZE)
    p_q += head_offset(i_batch, i_head, stride_qb, stride_qh)
    q = load_rows(p_q, i_tile * BM, stride_qt, n_queries, BM, D, BD, True).to(tl.float32)
    p_means += (i_bh // repeat).to(tl.int64) * n_keys * D
    p_rows = p_scores + (i_bh.to(tl.int64) * n_queries + row) * n_blocks
    score = tl.sum(q * load_means(p_means, own, inside, D, BD), 1) * scale
    tl.store(p_rows + own_block, score, mask=inside)
    slope = head_slope(p_slopes, i_head, 1.0, SLOPES)
    start = -1
    for _ in tl.range(0, count_documents(first), num_stages=1):
        start, last, end = next_document(first, own, start)
        before = tl.minimum((end - 1 - start) // SIZE, n_blocks)  # blocks before some query's own
        for lo in range(0, before, BN):
            block = lo + tl.arange(0, BN)
            key = start + (block + 1) * SIZE - 1
            means = load_means(p_means, key, block < before, D, BD)
            x = tl.dot(q, tl.trans(means), input_precision=PRECISION) * scale
            if SLOPES:
                x = add_position_bias(x, own[:, None], key[None, :], start, slope)
            mask = (block[None, :] < tl.where(last >= 0, own_block, -1)[:, None]) & (block < before)[None, :]
            tl.store(p_rows[:, None] + block[None, :], x, mask=mask)


@triton.jit(do_not_specialize=LENGTHS)
def score_means_dq(
    p_grad, p_q, p_means, p_first, p_own, p_dq, p_shares, stride_qb, stride_qh, stride_qt, stride_ob, stride_oh,
    stride_ot, stride_row, scale, heads, repeat, n_queries, n_keys, n_blocks,
    SIZE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs as of `score_means`: dq, and what each query adds to the gradient of its own key's mean.

    p_grad: float32 (B, H, n, C). p_shares: float32 (B, H, n, D)."""
    i_tile, i_bh = tl.program_id(0), tl.program_id(1)
    i_batch, i_head = i_bh // heads, i_bh % heads
    row, first, own = load_queries(p_first, p_own, i_batch, i_tile, stride_row, n_queries, n_keys, BM)
    own_block, inside = own_blocks(first, own, n_blocks, SIZE)
    p_q += head_offset(i_batch, i_head, stride_qb, stride_qh)
    q = load_rows(p_q, i_tile * BM, stride_qt, n_queries, BM, D, BD, True).to(tl.float32)
    p_means += (i_bh // repeat).to(tl.int64) * n_keys * D
    p_rows = p_grad + (i_bh.to(tl.int64) * n_queries + row) * n_blocks
    own_grad = tl.load(p_rows + own_block, mask=inside, other=0.0)[:, None] * scale
    p_shares += i_bh.to(tl.int64) * n_queries * D
    store_rows(p_shares, tl.where(inside[:, None], own_grad * q, 0.0), i_tile * BM, D, n_queries, BM, D, BD)
    dq = own_grad * load_means(p_means, own, inside, D, BD)
    start = -1
    for _ in tl.range(0, count_documents(first), num_stages=1):
        start, last, end = next_document(first, own, start)
        before = tl.minimum((end - 1 - start) // SIZE, n_blocks)
        for lo in range(0, before, BN):
            block = lo + tl.arange(0, BN)
            means = load_means(p_means, start + (block + 1) * SIZE - 1, block < before, D, BD)
            mask = (block[None, :] < tl.where(last >= 0, own_block, -1)[:, None]) & (block < before)[None, :]
            grad = tl.load(p_rows[:, None] + block[None, :], mask=mask, other=0.0) * scale
            dq = seen_dot(grad, mask, means, dq, PRECISION)
    p_dq += head_offset(i_batch, i_head, stride_ob, stride_oh)
    store_rows(p_dq, dq, i_tile * BM, stride_ot, n_queries, BM, D, BD)


@triton.jit
def reading_rows(p_first, p_own, lo, hi, n_queries, CHUNK: tl.constexpr):
    """The first query that sees a key of lo ... hi, and one behind the last (0 without any)."""
    begin, end = n_queries, 0
    for start in range(0, n_queries, CHUNK):
        row = start + tl.arange(0, CHUNK)
        first = tl.load(p_first + row, mask=row < n_queries, other=FAR)
        own = tl.load(p_own + row, mask=row < n_queries, other=-1)
        sees = (first <= hi) & (own >= lo)
        begin = tl.minimum(begin, tl.min(tl.where(sees, row, FAR), 0))
        end = tl.maximum(end, tl.max(tl.where(sees, row + 1, 0), 0))
    return begin, end


@triton.jit(do_not_specialize=LENGTHS)
def score_means_dmeans(
    p_grad, p_q, p_first, p_own, p_ends, p_parts, stride_qb, stride_qh, stride_qt, stride_row,
    scale, heads, n_queries, n_keys, n_blocks, n_ends,
    SIZE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One program a tile of BN full blocks and query head: a loop over the queries behind them.

    p_ends: int32 (n_ends,), the last key of each full block, -1 for none. p_parts: float32 (B, H, n_ends, D), the
    head's share of the gradients of their means."""
    i_tile, i_bh = tl.program_id(0), tl.program_id(1)
    i_batch, i_head = i_bh // heads, i_bh % heads
    entry = i_tile * BN + tl.arange(0, BN)
    key = tl.load(p_ends + entry, mask=entry < n_ends, other=-1)
    lo = tl.min(tl.where(key >= 0, key, FAR), 0)
    p_first, p_own = p_first + i_batch * stride_row, p_own + i_batch * stride_row
    begin, end = reading_rows(p_first, p_own, lo, tl.max(key, 0), n_queries, CHUNK)
    p_q += head_offset(i_batch, i_head, stride_qb, stride_qh)
    p_grad += i_bh.to(tl.int64) * n_queries * n_blocks
    out = tl.zeros([BN, BD], tl.float32)
    for tile in range(begin // BM, (end + BM - 1) // BM):
        row, first, own = load_queries(p_first, p_own, 0, tile, 0, n_queries, n_keys, BM)
        own_block, _ = own_blocks(first, own, n_blocks, SIZE)
        block = (key[None, :] - first[:, None]) // SIZE
        reads = (key[None, :] >= first[:, None]) & (block < tl.minimum(own_block, n_blocks)[:, None])
        pointers = p_grad + row.to(tl.int64)[:, None] * n_blocks + block
        reads = reads & (key >= 0)[None, :]
        grad = tl.load(pointers, mask=reads, other=0.0)
        q = load_rows(p_q, tile * BM, stride_qt, n_queries, BM, D, BD, True).to(tl.float32)
        out = seen_dot(tl.trans(grad), tl.trans(reads.to(tl.float32)), q, out, PRECISION)
    p_parts += i_bh.to(tl.int64) * n_ends * D
    store_rows(p_parts, out * scale, i_tile * BN, D, n_ends, BN, D, BD)
