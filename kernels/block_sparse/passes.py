"""Device functions of the block-sparse Triton kernel: which blocks of keys are read, and attention over them."""

import triton
import triton.language as tl

from kernels.common.tiles import bit_or, load_rows, nan_maximum, tile_scores


@triton.jit
def load_block(
    rows, i_batch, i_head, block, stride, n_rows,
    BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """[BN, BD] of keys or values, 0 past D; past n_rows 0 (if MASKED or TMA).

    rows: a descriptor of the whole (B, G, Tk, D) (if TMA), else a pointer to the head's first row.
    """
    if TMA:
        return tl.reshape(rows.load([i_batch, i_head, block * BN, 0]), (BN, BD))
    else:
        return load_rows(rows, block * BN, stride, n_rows, BN, D, BD, MASKED)


@triton.jit
def scores_above(x, threshold, BM: tl.constexpr, BN: tl.constexpr):
    """int32 [BM, 4]: whether any score of a quarter of the row is above the row's threshold, or NaN. x: [BM, BN].

    Maxima stay within a thread: the dot gives it columns 2 i and 2 i + 1 of every eight, for i one of four lanes.
    """
    pairs = tl.reduce(tl.reshape(x, (BM, BN // 8, 4, 2)), 3, nan_maximum)
    lanes = tl.reduce(pairs, 1, nan_maximum)  # [BM, 4]
    return ((lanes > threshold[:, None]) | (lanes != lanes)).to(tl.int32)


@triton.jit
def append_blocks(p_list, count, block, kept):
    """Appends those of `block` where kept is 1, in order, to the list, which has count entries. Returns its length."""
    tl.store(p_list + count + tl.cumsum(kept, 0) - kept, block, mask=kept != 0)
    return count + tl.sum(kept, 0)


@triton.jit
def list_given(p_list, p_given, lo, hi, n_before, CHUNK: tl.constexpr):
    """Appends the given ones of blocks [lo, hi) to the list, which has n_before entries. Returns its length. p_given:
    a byte for each block, 1 or 0."""
    count = n_before
    for start in range(lo, hi, CHUNK):
        block = start + tl.arange(0, CHUNK)
        given = tl.load(p_given + block, mask=block < hi, other=0)
        count = append_blocks(p_list, count, block, given.to(tl.int32))
    return count


@triton.jit
def list_above(
    p_list, p_bits, q, keys, i_batch, i_group, stride_k, lo, hi, n_before, threshold, limit, slope, first, end,
    position, n_keys, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
    BIAS: tl.constexpr, MASKED: tl.constexpr, STATS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Appends those of blocks [lo, hi) above the threshold to the list, which has n_before entries. Returns its length.

    threshold: [BM], in units of the raw scores; +inf for rows that do not count. limit: the same as a scalar; at -inf
    every block is kept and no score is computed. p_bits: words that get the bits of kept blocks (if STATS), zeros
    before.
    """
    count = n_before
    n = tl.arange(0, 32)
    for start in range(lo, hi, 32):
        stop = tl.minimum(start + 32, hi)
        word = tl.where(stop - start == 32, -1, (1 << (stop - start)) - 1)
        if limit > float("-inf"):
            marks = tl.zeros([BM, 4], tl.int32)  # bit m: of block start + m; no reduction over rows until 32 are done
            for m in tl.range(0, stop - start, num_stages=STAGES):
                k = load_block(keys, i_batch, i_group, start + m, stride_k, n_keys, BN, D, BD, TMA, MASKED)
                x = tile_scores(q, k, start + m, slope, first, end, position, BN, BIAS, MASKED, PRECISION)
                marks |= scores_above(x, threshold, BM, BN) << m
            word = tl.reduce(tl.reduce(marks, 1, bit_or), 0, bit_or)
        kept = (word >> n) & 1
        count = append_blocks(p_list, count, start + n, kept)
        if STATS:
            block = start + n
            tl.atomic_or(p_bits + block // 32, 1 << (block % 32), mask=kept != 0)
    return count


@triton.jit
def list_off_diagonal(
    p_list, p_bits, q, keys, i_batch, i_group, stride_k, before, after, full, hi, threshold, limit, slope, first, end,
    position, n_keys, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    TMA: tl.constexpr, BIAS: tl.constexpr, STATS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Lists those of blocks [0, before) and, unless CAUSAL, [after, hi) above the threshold. Returns how many of them
    are below `full`, where all rows see them whole, and how many there are."""
    n_full = list_above(
        p_list, p_bits, q, keys, i_batch, i_group, stride_k, 0, before, 0, threshold, limit, slope,
        first, end, position, n_keys, D, BD, BM, BN, TMA, BIAS, False, STATS, PRECISION, STAGES,
    )  # fmt: skip
    n_kept = n_full
    if not CAUSAL:
        n_full = list_above(
            p_list, p_bits, q, keys, i_batch, i_group, stride_k, after, full, n_full, threshold, limit, slope,
            first, end, position, n_keys, D, BD, BM, BN, TMA, BIAS, False, STATS, PRECISION, STAGES,
        )  # fmt: skip
        n_kept = list_above(
            p_list, p_bits, q, keys, i_batch, i_group, stride_k, full, hi, n_full, threshold, limit, slope,
            first, end, position, n_keys, D, BD, BM, BN, TMA, BIAS, True, STATS, PRECISION, STAGES,
        )  # fmt: skip
    return n_full, n_kept


@triton.jit
def add_block(x, v, out, total, top, exp2_scale, PRECISION: tl.constexpr):
    """One block of FlashAttention-2 (arXiv:2307.08691), x its raw scores [BM, BN], v its values [BN, BD].

    out: [BM, BD], sum of p v; total: [BM], sum of p; top: [BM], running maximum of the raw scores.
    """
    new_top = tl.maximum(top, tl.max(x, 1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top * exp2_scale)  # rows that have seen no score yet
    p = tl.exp2(x * exp2_scale - shift[:, None])
    shrink = tl.exp2(top * exp2_scale - shift)
    total = total * shrink + tl.sum(p, 1)
    out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
    return out, total, new_top


@triton.jit
def attend(
    q, keys, values, i_batch, i_group, stride_k, stride_v, p_list, p_bits, lo, hi, out, total, top, exp2_scale,
    threshold, limit, slope, first, end, position, n_keys, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, TMA: tl.constexpr, LISTED: tl.constexpr, FUSED: tl.constexpr, BIAS: tl.constexpr,
    MASKED: tl.constexpr, STATS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds entries [lo, hi) of the list (if LISTED), or those of blocks [lo, hi) that have a score above the threshold
    (if FUSED), or all of these. threshold, limit, p_bits: of FUSED, as in list_above."""
    for n in tl.range(lo, hi, num_stages=STAGES):
        block = n
        if LISTED:
            block = tl.load(p_list + n)
        k = load_block(keys, i_batch, i_group, block, stride_k, n_keys, BN, D, BD, TMA, MASKED)
        x = tile_scores(q, k, block, slope, first, end, position, BN, BIAS, MASKED, PRECISION)
        if FUSED:
            above = tl.reduce(tl.reduce(scores_above(x, threshold, BM, BN), 1, bit_or), 0, bit_or)
            if (above != 0) | (limit == float("-inf")):
                v = load_block(values, i_batch, i_group, block, stride_v, n_keys, BN, D, BD, TMA, MASKED)
                out, total, top = add_block(x, v, out, total, top, exp2_scale, PRECISION)
                if STATS:
                    tl.atomic_or(p_bits + block // 32, 1 << (block % 32))
        else:
            v = load_block(values, i_batch, i_group, block, stride_v, n_keys, BN, D, BD, TMA, MASKED)
            out, total, top = add_block(x, v, out, total, top, exp2_scale, PRECISION)
    return out, total, top
