"""The scan: one dense pass over visible keys that bounds every row's threshold from below and marks the tiles that can
hold support. Nothing else in forward or backward touches a tile that is not marked."""

import triton
import triton.language as tl

from kernels.alpha_entmax.threshold import raise_threshold
from kernels.common.tiles import (
    LENGTHS,
    add_position_bias,
    bit_or,
    is_visible,
    load_rows,
    nan_maximum,
    store_live_bits,
    tile_range,
)

FIRST_BLOCKS = tl.constexpr(4)  # of keys before the first update of the bound
NEAREST_BLOCKS = tl.constexpr(8)  # of keys that come before the spread ones


@triton.jit
def scan_block(
    q, p_k, stride_k, block, slot, best, threshold, marks, z_scale, slope, first, end, position, n_keys,
    D: tl.constexpr, BD: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
    FOLD: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of SPAN tiles of keys: keeps the best score of every column slot, marks rows with scores above the
    threshold.

    best: [ROWS, SPAN * TILE / FOLD], for each slot (FOLD columns of a tile share one) the maximum over all blocks so
        far: distinct scores of the row, the subset that the threshold is bounded from.
    threshold: [ROWS, 4], running lower bound of the row's, one for each of the four lanes that share a row.
    marks: int32 [ROWS, SPAN, 4], bit `slot` of each.
    """
    key = block * (SPAN * TILE) + tl.arange(0, SPAN * TILE)
    k = load_rows(p_k, block * (SPAN * TILE), stride_k, n_keys, SPAN * TILE, D, BD, MASKED)  # [SPAN * TILE, BD]
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [ROWS, SPAN * TILE]
    if BIAS:
        x = add_position_bias(x, position[:, None], key[None, :], block * (SPAN * TILE), slope)
    if MASKED:
        x = tl.where(is_visible(key[None, :], first[:, None], end[:, None]), x, float("-inf"))
    # maxima stay within a thread: the dot gives it columns 2 i and 2 i + 1 of every eight, for i one of four lanes
    folded = tl.reduce(tl.reshape(x, (ROWS, SPAN, FOLD, TILE // FOLD)), 2, nan_maximum)  # [ROWS, SPAN, TILE // FOLD]
    best = tl.maximum(best, tl.reshape(folded, (ROWS, SPAN * TILE // FOLD)), propagate_nan=tl.PropagateNan.ALL)
    lanes = tl.max(tl.max(tl.reshape(folded, (ROWS, SPAN, TILE // FOLD // 8, 4, 2)), 4), 2) * z_scale  # [ROWS, SPAN, 4]
    marks |= (lanes > threshold[:, None, :]).to(tl.int32) << slot
    return best, tl.maximum(threshold, tl.max(lanes, 1) - 1), marks


@triton.jit
def far_limit(threshold, best_dot, z_scale, slope, sees, position, SIZE: tl.constexpr):
    """First block of SIZE keys that can matter under position bias, 0 where slope is 0: |q| |k| bounds every score
    (Cauchy-Schwarz) and the bias falls by `slope` per key, so keys beyond that reach need no scores at all."""
    reach = (best_dot - threshold / z_scale) / tl.where(slope > 0, slope, 1.0)
    reach = tl.where(reach < 1e9, reach, 1e9)  # NaN too
    first = tl.where(sees, position.to(tl.float32) - reach - 1, 1e9)
    first = tl.where(slope > 0, first, 0.0)
    return tl.maximum(tl.min(first, 0), 0.0).to(tl.int32) // SIZE


@triton.jit
def far_stride(rest):
    """A stride below `rest` (0 for one) that meets each of so many blocks once."""
    return tl.where(rest % 37 != 0, 37, tl.where(rest % 41 != 0, 41, 1)) % rest


@triton.jit
def block_in_order(n, lo, hi, far, SPREAD: tl.constexpr):
    """The n-th of blocks [lo, hi) to scan: backwards. If SPREAD the first one (attention sinks), the nearest, then what
    `far` counts, strides through the rest: an early bound from all over a row marks few tiles in vain."""
    if SPREAD:
        return tl.where(n == 0, lo, tl.where(n <= NEAREST_BLOCKS, hi - n, lo + 1 + far))
    else:
        return hi - 1 - n


@triton.jit
def scan_range(
    q, p_k, stride_k, p_flags, capacity, lo, hi, limit, best, tau, alpha, beta, z_scale, slope, best_dot,
    first, end, sees, position, n_keys,
    D: tl.constexpr, BD: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
    FOLD: tl.constexpr, CHUNK: tl.constexpr, BIAS: tl.constexpr, SKIP_FAR: tl.constexpr, SPREAD: tl.constexpr,
    MASKED: tl.constexpr, POWER: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Scans blocks [max(lo, limit), hi) in the order of block_in_order. After every CHUNK of them (fewer at first) it
    flags the marked tiles and raises the bound and, under position bias, the limit."""
    TILES: tl.constexpr = ROWS // TILE
    row_tile = tl.arange(0, TILES)[:, None]
    done, far = 0, 0
    total = hi - tl.maximum(lo, limit)
    rest = tl.maximum(hi - lo - 1 - NEAREST_BLOCKS, 1)
    stride = far_stride(rest) if SPREAD else 0
    while done < total:
        running = tau[:, None] + tl.zeros([1, 4], tl.float32)
        marks = tl.zeros([ROWS, SPAN, 4], tl.int32)
        size = tl.minimum(tl.maximum(done, FIRST_BLOCKS), CHUNK)  # the first bounds, from few keys, mark much in vain
        for n in tl.range(done, tl.minimum(done + size, total), num_stages=STAGES):
            block = block_in_order(n, lo, hi, far, SPREAD)
            if SPREAD:
                far += tl.where(n > NEAREST_BLOCKS, stride, 0)
                far -= tl.where(far >= rest, rest, 0)
            best, running, marks = scan_block(
                q, p_k, stride_k, block, n - done, best, running, marks, z_scale, slope, first, end, position, n_keys,
                D, BD, TILE, ROWS, SPAN, FOLD, BIAS, MASKED, PRECISION,
            )  # fmt: skip
        marks = tl.reshape(tl.reduce(marks, 2, bit_or), (TILES, TILE, SPAN))
        marks = tl.reduce(marks, 1, bit_or)  # [TILES, SPAN]
        n = tl.arange(0, CHUNK)
        block = block_in_order(done + n, lo, hi, (done + n - 1 - NEAREST_BLOCKS) * stride % rest, SPREAD)
        marked = (marks[:, :, None] >> n[None, None, :]) & 1  # [TILES, SPAN, CHUNK]
        tile = block[None, None, :] * SPAN + tl.arange(0, SPAN)[None, :, None]
        tl.store(p_flags + row_tile[:, :, None] * capacity + tile, 1, mask=marked != 0)
        tau = raise_threshold(best * z_scale, tau, alpha, beta, 1, POWER)
        done += size
        if SKIP_FAR:
            limit = tl.maximum(limit, far_limit(tau, best_dot, z_scale, slope, sees, position, SPAN * TILE))
            total = hi - tl.maximum(lo, limit)
    return best, tau, limit


@triton.jit(do_not_specialize=LENGTHS)
def entmax_scan(
    p_q, p_k, p_alpha, p_slopes, p_key_norms, p_rows, p_blocks, p_flags, p_counter, p_tau, p_bits,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    scale, heads, repeat, n_queries, n_keys, n_tasks, n_blocks, n_words, capacity, batch_step, stride_rows,
    D: tl.constexpr, BD: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, FOLD: tl.constexpr,
    CHUNK: tl.constexpr, LIST_CHUNK: tl.constexpr, FIELDS: tl.constexpr, BIAS: tl.constexpr, SKIP_FAR: tl.constexpr,
    POWER: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Programs take blocks of ROWS queries from a counter until none is left, long ones first within a head. Long,
    since a task's values stay in registers from load to store; so are the other kernels of attention.

    p_tau: float32 (B, H, Tq), lower bounds of the thresholds; +inf for rows that see nothing, NaN for rows with a NaN
        or +inf score. p_bits: int32 (B, H, query tiles, words), the marked tiles. batch_step: 1 where batch rows have
        their own intervals (kv_lens), else 0. CHUNK: blocks of SPAN tiles between two updates of the bound.
    """
    TILES: tl.constexpr = ROWS // TILE
    KEYS: tl.constexpr = SPAN * TILE
    p_flags += tl.program_id(0) * capacity * TILES
    n_row_blocks = (n_blocks + TILES - 1) // TILES
    task = tl.atomic_add(p_counter, 1)
    while task < n_tasks:
        i_bh, i_block = task // n_row_blocks, n_row_blocks - 1 - task % n_row_blocks
        i_batch, i_head = i_bh // heads, i_bh % heads
        row = i_block * ROWS + tl.arange(0, ROWS)
        inside = row < n_queries
        position = row + tl.load(p_blocks + i_batch * batch_step * n_blocks * FIELDS + 4)
        o_row = i_batch * batch_step * n_queries + row
        first = tl.load(p_rows + o_row, mask=inside, other=0)
        end = tl.load(p_rows + stride_rows + o_row, mask=inside, other=0)
        sees = first < end
        block_lo, block_hi, full_lo, full_hi = tile_range(first, end, sees, KEYS)

        alpha = tl.load(p_alpha + i_head)
        beta = 1 / (alpha - 1)
        z_scale = (alpha - 1) * scale
        slope = 0.0
        if BIAS:
            slope = tl.load(p_slopes + i_head) / scale
        p_keys = p_k + i_batch.to(tl.int64) * stride_kb + (i_head // repeat).to(tl.int64) * stride_kh
        o_q = i_batch.to(tl.int64) * stride_qb + i_head.to(tl.int64) * stride_qh
        q = load_rows(p_q + o_q, i_block * ROWS, stride_qt, n_queries, ROWS, D, BD, True)  # [ROWS, BD]
        best_dot = tl.zeros([ROWS], tl.float32)
        if SKIP_FAR:
            key_norm = tl.load(p_key_norms + i_batch * (heads // repeat) + i_head // repeat)
            q_norm = tl.sqrt(tl.sum(q.to(tl.float32) * q.to(tl.float32), 1))
            best_dot = q_norm * key_norm * 1.0001  # covers rounding in the dots

        # The keys that only some rows see first: in causal attention the newest
        best = tl.full([ROWS, KEYS // FOLD], float("-inf"), tl.float32)
        tau = tl.where(sees, float("-inf"), float("inf"))  # [ROWS]
        limit = block_lo
        best, tau, limit = scan_range(
            q, p_keys, stride_kt, p_flags, capacity, full_hi, block_hi, limit, best, tau, alpha, beta, z_scale,
            slope, best_dot,
            first, end, sees, position, n_keys, D, BD, TILE, ROWS, SPAN, FOLD, CHUNK, BIAS, SKIP_FAR, False,
            True, POWER, PRECISION, STAGES,
        )  # fmt: skip
        best, tau, limit = scan_range(
            q, p_keys, stride_kt, p_flags, capacity, full_lo, full_hi, limit, best, tau, alpha, beta, z_scale, slope,
            best_dot,
            first, end, sees, position, n_keys, D, BD, TILE, ROWS, SPAN, FOLD, CHUNK, BIAS, SKIP_FAR, not BIAS,
            False, POWER, PRECISION, STAGES,
        )  # fmt: skip
        best, tau, limit = scan_range(
            q, p_keys, stride_kt, p_flags, capacity, block_lo, full_lo, limit, best, tau, alpha, beta, z_scale,
            slope, best_dot,
            first, end, sees, position, n_keys, D, BD, TILE, ROWS, SPAN, FOLD, CHUNK, BIAS, SKIP_FAR, False,
            True, POWER, PRECISION, STAGES,
        )  # fmt: skip
        tau = raise_threshold(best * z_scale, tau, alpha, beta, 3, POWER)
        top = tl.max(best, 1)
        # coarser than the rounding that tiles ruled out by position bias add: same bits with them and without
        tau = tl.maximum(tl.floor(tau * 4096) / 4096, top * z_scale - 1)
        nan = sees & ((tl.max((best != best).to(tl.int32), 1) > 0) | (top == float("inf")))
        tau = tl.where(sees & (top > float("-inf")), tau, float("inf"))
        tau = tl.where(nan, float("nan"), tau)
        tl.store(p_tau + i_bh.to(tl.int64) * n_queries + row, tau, mask=inside)
        tl.debug_barrier()  # flags were written by all warps
        any_nan = tl.max(nan.to(tl.int32), 0) > 0
        for i_tile in range(0, TILES):
            i_row_tile = i_block * TILES + i_tile
            p_words = p_bits + (i_bh.to(tl.int64) * n_blocks + i_row_tile) * n_words
            store_live_bits(
                p_flags + i_tile * capacity, p_words, block_lo * SPAN, block_hi * SPAN,
                tl.where(i_row_tile < n_blocks, n_words, 0), any_nan, None, False, LIST_CHUNK,
            )  # fmt: skip
        tl.debug_barrier()  # the next task flags anew
        task = tl.atomic_add(p_counter, 1)
