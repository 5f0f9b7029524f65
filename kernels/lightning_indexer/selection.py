"""Which keys a query chooses: scores of some queries are written once, then each row finds its least chosen score digit
by digit, as a radix sort would, and writes bits."""

import triton
import triton.language as tl

from kernels.common.tiles import load_rows
from kernels.lightning_indexer.tiles import LENGTHS, index_scores, load_intervals

COUNTS = [*LENGTHS, "start_row", "stop_row", "width", "count"]


@triton.jit
def first_column(p_first, start):
    """The key that column 0 of the scores of a tile of queries stands for: the tile's first one, in whole bytes."""
    return tl.maximum(tl.load(p_first + start).to(tl.int32), 0) // 8 * 8


@triton.jit(do_not_specialize=COUNTS)
def write_scores(
    p_index_q, p_index_k, p_weights, p_first, p_own, p_scores,
    stride_ib, stride_ih, stride_it, stride_jb, stride_jt, stride_wb, stride_wh, stride_wt, stride_rows,
    n_queries, n_keys, start_row, stop_row, width, count,
    INDEX_HEADS: tl.constexpr, ID: tl.constexpr, BID: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    INDEX_PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program a tile of BN columns, of BM queries of [start_row, stop_row), and a batch row. p_scores: float32
    (B, stop_row - start_row, width), what `first_column` and those behind it are rated. Tiles in which no query has to
    choose are left out."""
    i_column, i_block, i_batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = start_row + i_block * BM
    row = start + tl.arange(0, BM)
    inside = row < stop_row
    p_first += i_batch * stride_rows
    p_own += i_batch * stride_rows
    first, end = load_intervals(p_first, p_own, row, inside)
    start_key = first_column(p_first, start) + i_column * BN
    if (start_key < tl.max(end, 0)) & (tl.max(end - first, 0) > count):
        k = load_rows(p_index_k + i_batch * stride_jb, start_key, stride_jt, n_keys, BN, ID, BID, True)
        scores = index_scores(
            p_index_q + i_batch * stride_ib, p_weights + i_batch * stride_wb, k, start, row, inside,
            stride_ih, stride_it, stride_wh, stride_wt, n_queries,
            INDEX_HEADS, ID, BID, BM, BN, INDEX_PRECISION, STAGES,
        )  # fmt: skip
        column = i_column * BN + tl.arange(0, BN)
        p_rows = p_scores + (i_batch * (stop_row - start_row) + i_block * BM + tl.arange(0, BM)) * width
        tl.store(p_rows[:, None] + column[None, :], scores, mask=inside[:, None] & (column < width)[None, :])


@triton.jit
def score_rank(x, SCORE_BITS: tl.constexpr):
    """int32 below 2 ** (SCORE_BITS + 8), ordered as x rounded to SCORE_BITS bits; 0 and -0 are one, NaN of either sign
    stands above infinity."""
    DROPPED: tl.constexpr = 24 - SCORE_BITS
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    nan = size > 0x7F800000
    size = tl.where(nan, 0x7F800000 + (1 << DROPPED), size)
    size = (size + ((1 << (DROPPED - 1)) - 1) + ((size >> DROPPED) & 1)) >> DROPPED  # to nearest, ties to even
    return tl.where((bits < 0) & ~nan, -size, size) + (1 << (SCORE_BITS + 7))


@triton.jit
def load_ranks(p_scores, column, lo, hi, width, SCORE_BITS: tl.constexpr):
    """Ranks of a row's columns, and which of them stand for keys that it sees, [lo, hi)."""
    seen = (column >= lo) & (column < hi)
    return score_rank(tl.load(p_scores + column, mask=seen & (column < width), other=0.0), SCORE_BITS), seen


@triton.jit
def least_rank(
    p_scores, lo, hi, width, count, SCORE_BITS: tl.constexpr, DIGIT_BITS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """The `count`th largest rank of columns [lo, hi), which are more than `count`, and how many of those with this rank
    are too many. DIGIT_BITS: of a rank, looked at in one pass over the row."""
    BINS: tl.constexpr = 1 << DIGIT_BITS
    DIGITS: tl.constexpr = (SCORE_BITS + 8 + DIGIT_BITS - 1) // DIGIT_BITS
    bins = tl.arange(0, BINS)
    rank, left, ties = lo * 0, lo * 0 + count, lo * 0
    for i in tl.static_range(0, DIGITS):
        shift = DIGIT_BITS * (DIGITS - 1 - i)
        found = tl.zeros([BINS], tl.int32)
        for start in tl.range(lo // 8 * 8, hi, CHUNK, num_stages=1):
            each, seen = load_ranks(p_scores, start + tl.arange(0, CHUNK), lo, hi, width, SCORE_BITS)
            held = seen
            if i > 0:  # whose digits before this one are the same; before the first a shift might be one of 32 bits
                held = held & ((each >> (shift + DIGIT_BITS)) == rank)
            found += tl.histogram(tl.where(held, (each >> shift) & (BINS - 1), 0), BINS)
            found -= tl.where(bins == 0, CHUNK - tl.sum(held.to(tl.int32), 0), 0)
        from_here = tl.sum(found, 0) - tl.cumsum(found, 0) + found  # with this digit or a larger one
        digit = tl.sum((from_here >= left).to(tl.int32), 0) - 1
        left -= tl.sum(tl.where(bins > digit, found, 0), 0)
        ties = tl.sum(tl.where(bins == digit, found, 0), 0)
        rank = rank * BINS + digit
    return rank, ties - left


@triton.jit(do_not_specialize=COUNTS)
def choose_keys(
    p_scores, p_first, p_own, p_bits, stride_rows, stride_bits, start_row, stop_row, width, n_queries, count,
    SCORE_BITS: tl.constexpr, DIGIT_BITS: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program a query of [start_row, stop_row) and batch row.

    p_scores: as `write_scores` leaves them. p_bits: uint8 (B, n, stride_bits), zeros before. BM: of write_scores."""
    i_row, i_batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = start_row + i_row
    p_first += i_batch * stride_rows
    p_own += i_batch * stride_rows
    base = first_column(p_first, start_row + i_row // BM * BM)
    first, end = tl.maximum(tl.load(p_first + row).to(tl.int32), base), tl.load(p_own + row).to(tl.int32) + 1
    lo, hi = first - base, end - base
    p_scores += (i_batch * (stop_row - start_row) + i_row) * width
    p_bits += (i_batch * n_queries + row) * stride_bits
    least, surplus = lo * 0 - 1, lo * 0  # all that is seen
    if hi - lo > count:
        least, surplus = least_rank(p_scores, lo, hi, width, count, SCORE_BITS, DIGIT_BITS, CHUNK)
    before = lo * 0
    for start in tl.range(lo // 8 * 8, hi, CHUNK, num_stages=1):
        rank, seen = load_ranks(p_scores, start + tl.arange(0, CHUNK), lo, hi, width, SCORE_BITS)
        tied = (seen & (rank == least)).to(tl.int32)
        late = before + tl.cumsum(tied, 0) > surplus
        before += tl.sum(tied, 0)
        chosen = (seen & ((rank > least) | ((tied != 0) & late))).to(tl.int32)
        bits = tl.sum(tl.reshape(chosen, [CHUNK // 8, 8]) << tl.arange(0, 8)[None, :], 1)
        byte = (base + start) // 8 + tl.arange(0, CHUNK // 8)
        tl.store(p_bits + byte, bits.to(tl.uint8), mask=byte < stride_bits)
