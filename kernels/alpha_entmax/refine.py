"""Refinement: brings the scan's bounds to the threshold, over what can hold weight only: single keys where they are few
of their tiles' keys, else whole tiles, which it unmarks as they fall below the threshold."""

import triton
import triton.language as tl

from kernels.alpha_entmax.threshold import (
    is_far,
    newton_step,
    norm_and_slope,
    support_distance,
    support_power,
)
from kernels.common.key_lists import (
    FIRST_TILES,
    MARK_WORDS,
    fill_rows,
    is_sparse,
    key_scores,
    key_words,
    list_row_keys,
    mark_keys,
    mark_rows,
    step_entries,
    write_key_bits,
)
from kernels.common.tiles import (
    LENGTHS,
    flag_listed,
    head_offset,
    head_scales,
    keep_marked,
    list_row_tiles,
    listed_scores,
    load_rows,
    mark_listed,
    nan_maximum,
    query_task,
    store_live_bits,
)


@triton.jit
def sum_powers(
    q, p_k, stride_k, p_list, list_step, count, p_marks, power_sum, slope_sum, tau, z_scale, beta, slope,
    first, end, position, n_keys,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    BIAS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, POWER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds sum u ** beta and sum u ** (beta - 1) of the listed tiles; marks the tiles with any u > 0."""
    marks = tl.zeros([BM], tl.int32)
    for n in tl.range(0, count, num_stages=STAGES):
        tile = tl.load(p_list + n * list_step)
        x = listed_scores(
            q, p_k, stride_k, tile, slope, first, end, position, n_keys, D, BD, BM, BIAS, MASKED, PRECISION
        )
        u = support_distance(x, z_scale, tau[:, None])
        w = support_power(u, beta, POWER)
        power_sum += tl.sum(w * u, 1)
        tile_slope_sum = tl.sum(w, 1)
        slope_sum += tile_slope_sum
        marks = mark_listed(p_marks, marks, tile_slope_sum > 0, n, count, 1)
    return power_sum, slope_sum


@triton.jit
def raise_by_newton(tau, power_sum, slope_sum, alpha, POWER: tl.constexpr):
    """A Newton step from below: the new tau, the step and the slope of N that it was taken with."""
    norm, norm_slope = norm_and_slope(power_sum, slope_sum, alpha, POWER)
    step = tl.maximum(newton_step(norm, norm_slope), 0.0)
    return tau + step, step, norm_slope


@triton.jit
def mark_tiles(
    q, p_k, stride_k, p_list, list_step, first_tile, count, p_marks, p_row_bits, limit, slope, first, end, row, inside,
    position, n_queries, n_keys, triangular,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr,
    ROWS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Marks the keys and (if ROWS) the (query, tile) pairs of listed tiles [first_tile, count) with a score above the
    row's limit. A limit of NaN marks all: such a row spoils what it sees."""
    rows = tl.zeros([BM, 4], tl.int32)  # for each of the four lanes that share a row
    marks = tl.zeros([BM // 16, 8, 4], tl.int32)
    for n in tl.range(first_tile, count, num_stages=STAGES):
        tile = tl.load(p_list + n * list_step)
        x = listed_scores(
            q, p_k, stride_k, tile, slope, first, end, position, n_keys, D, BD, BM, BIAS, MASKED, PRECISION
        )
        excess = x - limit[:, None]
        marks = mark_keys(p_marks, marks, excess, n, n == count - 1)
        if ROWS:
            excess = tl.reduce(tl.reshape(excess, (BM, BM // 8, 4, 2)), 3, nan_maximum)
            excess = tl.reduce(excess, 1, nan_maximum)  # [BM, 4]
            next_tile = tl.load(p_list + tl.minimum(n + 1, count - 1) * list_step)
            rows = mark_rows(
                p_row_bits, rows, ~(excess <= 0), row, inside, tile, next_tile, n == count - 1, n_queries, triangular
            )


@triton.jit
def sum_key_powers(
    q, p_k, stride_k, p_list, first_step, last_step, n_inner, count, capacity, power_sum, slope_sum, tau,
    z_scale, beta, slope, first, end, position, anchor,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, POWER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds sum u ** beta and sum u ** (beta - 1) over steps of a list of keys."""
    for n in tl.range(first_step, last_step, num_stages=STAGES):
        key = step_entries(p_list, n, n_inner, count, capacity, BM, MASKED)
        x, _ = key_scores(q, p_k, stride_k, key, slope, first, end, position, anchor, D, BD, BIAS, MASKED, PRECISION)
        u = support_distance(x, z_scale, tau[:, None])
        w = support_power(u, beta, POWER)
        power_sum += tl.sum(w * u, 1)  # sums of each lane's own make the compiler move the whole product here
        slope_sum += tl.sum(w, 1)
    return power_sum, slope_sum


@triton.jit
def refine_over_tiles(
    q, p_k, stride_k, p_list, n_inner, n_edge, capacity, p_marks, tau, alpha, beta, z_scale, slope, tolerance, first,
    end, position, n_keys,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, LIST_CHUNK: tl.constexpr, MAX_STEPS: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, POWER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Newton's method until no row is_far. The list of tiles shrinks to those above the threshold.

    Returns tau, the last step, the slope of N that it was taken with, passes, and the list's inner tiles and edges."""
    passes = 0
    norm_slope = tl.full([BM], 1.0, tl.float32)
    step = tl.full([BM], 1.0, tl.float32)
    # Newton's error squares: after a step of the limit the next is about its square
    while (tl.max(is_far(step, norm_slope, alpha, tolerance).to(tl.int32), 0) > 0) & (passes < MAX_STEPS):
        power_sum = tl.zeros([BM], tl.float32)
        slope_sum = tl.zeros([BM], tl.float32)
        power_sum, slope_sum = sum_powers(
            q, p_k, stride_k, p_list, 1, n_inner, p_marks, power_sum, slope_sum, tau, z_scale, beta, slope,
            first, end, position, n_keys, D, BD, BM, BIAS, False, PRECISION, POWER, STAGES,
        )  # fmt: skip
        power_sum, slope_sum = sum_powers(
            q, p_k, stride_k, p_list + capacity - 1, -1, n_edge, p_marks + tl.cdiv(n_inner, 32), power_sum, slope_sum,
            tau, z_scale, beta, slope, first, end, position, n_keys, D, BD, BM, BIAS, True, PRECISION, POWER, STAGES,
        )  # fmt: skip
        tau, step, norm_slope = raise_by_newton(tau, power_sum, slope_sum, alpha, POWER)
        passes += 1
        n_inner, n_edge = (
            keep_marked(p_list, 1, p_marks, n_inner, LIST_CHUNK),
            keep_marked(p_list + capacity - 1, -1, p_marks + tl.cdiv(n_inner, 32), n_edge, LIST_CHUNK),
        )
    return tau, step, norm_slope, passes, n_inner, n_edge


@triton.jit
def refine_over_keys(
    q, p_k, stride_k, p_keys, n_inner, n_edge, capacity, tau, alpha, beta, z_scale, slope, tolerance, first, end,
    position, anchor,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, MAX_STEPS: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, POWER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """refine_over_tiles for a list of keys, which stays as it is. Returns tau, the last step, its slope of N."""
    whole, count = n_inner // BM, n_inner + n_edge
    passes = 0
    norm_slope = tl.full([BM], 1.0, tl.float32)
    step = tl.full([BM], 1.0, tl.float32)
    while (tl.max(is_far(step, norm_slope, alpha, tolerance).to(tl.int32), 0) > 0) & (passes < MAX_STEPS):
        power_sum = tl.zeros([BM], tl.float32)
        slope_sum = tl.zeros([BM], tl.float32)
        power_sum, slope_sum = sum_key_powers(
            q, p_k, stride_k, p_keys, 0, whole, n_inner, count, capacity, power_sum, slope_sum, tau, z_scale, beta,
            slope, first, end, position, anchor, D, BD, BM, BIAS, False, PRECISION, POWER, STAGES,
        )  # fmt: skip
        power_sum, slope_sum = sum_key_powers(
            q, p_k, stride_k, p_keys, whole, tl.cdiv(count, BM), n_inner, count, capacity, power_sum, slope_sum, tau,
            z_scale, beta, slope, first, end, position, anchor, D, BD, BM, BIAS, True, PRECISION, POWER, STAGES,
        )  # fmt: skip
        tau, step, norm_slope = raise_by_newton(tau, power_sum, slope_sum, alpha, POWER)
        passes += 1
    return tau, step, norm_slope


@triton.jit
def keep_listed(
    p_list, p_flags, p_words, n_inner, n_edge, tau, tile_lo, tile_hi, n_words, capacity, LIST_CHUNK: tl.constexpr
):  # fmt: skip
    """Leaves only the listed tiles marked (all where a row is NaN)."""
    flag_listed(p_list, 1, p_flags, n_inner, LIST_CHUNK)
    flag_listed(p_list + capacity - 1, -1, p_flags, n_edge, LIST_CHUNK)
    tl.debug_barrier()  # all warps have written their flags
    any_nan = tl.max((tau != tau).to(tl.int32), 0) > 0
    store_live_bits(p_flags, p_words, tile_lo, tile_hi, n_words, any_nan, None, False, LIST_CHUNK)


@triton.jit(do_not_specialize=LENGTHS)
def entmax_refine(
    p_q, p_k, p_alpha, p_slopes, p_rows, p_blocks, p_flags, p_list, p_keys, p_marks, p_counter, p_tau, p_bits,
    p_key_bits, p_row_bits, p_sparse, p_last, p_passes,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_last, stride_key_bits, stride_row_bits,
    scale, tolerance, heads, repeat, n_queries, n_keys, n_tasks, n_blocks, n_words, n_key_words, triangular, capacity,
    key_capacity, batch_step, stride_rows,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, LIST_CHUNK: tl.constexpr,
    FIELDS: tl.constexpr, MAX_STEPS: tl.constexpr, BIAS: tl.constexpr, POWER: tl.constexpr, PRECISION: tl.constexpr,
    STATS: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Programs take query tiles from a counter until none is left, long ones first within a head. p_tau and p_bits
    hold the scan's and get better ones. Long as entmax_scan is.

    KEYS: go over single keys where they are few. p_sparse: uint8 (B, H, query tiles), where that is so. p_key_bits:
        int32 (B, H, words), zeros before, gets one bit for each key that can have weight for any query of a tile
        (key_lists.key_words). p_row_bits: int32 (B, H, words), zeros before, one for each (query, tile of keys) if ROWS
        (key_lists.row_words).
    p_last: float32 (2, B, H, Tq), slope of N where the last step was taken from, and that step (see threshold.py).
    """
    i_program = tl.program_id(0)
    p_flags += i_program * capacity
    p_list += i_program * capacity
    if KEYS:
        p_keys += i_program * key_capacity
        p_marks += i_program * (capacity // 2 + 1) * MARK_WORDS
    else:
        p_marks += i_program * (capacity // 32 + 2)
    task = tl.atomic_add(p_counter, 1)
    while task < n_tasks:
        i_bh, i_batch, i_head, i_block, row, inside, position, first, end, p_block = query_task(
            task, p_rows, p_blocks, heads, n_queries, n_blocks, batch_step, stride_rows, BM, FIELDS
        )
        tile_lo, tile_hi = tl.load(p_block), tl.load(p_block + 1)
        inner_lo, inner_hi = tl.load(p_block + 2), tl.load(p_block + 3)

        alpha, beta, z_scale, slope = head_scales(p_alpha, p_slopes, i_head, scale, BIAS)
        p_k_head = p_k + head_offset(i_batch, i_head // repeat, stride_kb, stride_kh)
        o_q = head_offset(i_batch, i_head, stride_qb, stride_qh)
        q = load_rows(p_q + o_q, i_block * BM, stride_qt, n_queries, BM, D, BD, True)  # [BM, BD]

        o_bh = i_bh.to(tl.int64) * n_queries
        tau = tl.load(p_tau + o_bh + row, mask=inside, other=float("inf"))  # [BM]
        i_tile = i_bh.to(tl.int64) * n_blocks + i_block
        p_words = p_bits + i_tile * n_words
        n_inner, n_edge = list_row_tiles(
            p_words, p_list, tile_lo, tile_hi, inner_lo, inner_hi, capacity, LIST_CHUNK
        )  # fmt: skip
        passes = 0
        if KEYS:
            limit = tau / z_scale
            # covers the rounding of this and of the products compared; rows that see nothing keep +inf
            limit -= tl.where(tau < float("inf"), tl.abs(limit) * 5e-7, 0.0)
            p_head_rows = p_row_bits + i_bh.to(tl.int64) * stride_row_bits
            p_edge_marks = p_marks + (n_inner + 1) // 2 * MARK_WORDS
            p_edges = p_list + capacity - 1
            p_key_words = key_words(p_key_bits, i_bh, i_block, stride_key_bits, n_key_words, triangular)
            count, marked, goal = 0, 0, tl.minimum(n_inner, FIRST_TILES)
            while marked < goal:
                mark_tiles(
                    q, p_k_head, stride_kt, p_list, 1, marked, goal, p_marks, p_head_rows, limit, slope, first, end,
                    row, inside, position, n_queries, n_keys, triangular, D, BD, BM, BIAS, False, ROWS, PRECISION,
                    STAGES,
                )  # fmt: skip
                tl.debug_barrier()  # all warps have written their marks and row bits
                count += write_key_bits(p_marks, p_list, 1, marked, goal, p_key_words)
                marked, goal = goal, tl.where(is_sparse(count, goal), n_inner, goal)
            n_edge_marked = tl.where(marked < n_inner, 0, n_edge)
            mark_tiles(
                q, p_k_head, stride_kt, p_edges, -1, 0, n_edge_marked, p_edge_marks, p_head_rows, limit, slope, first,
                end, row, inside, position, n_queries, n_keys, triangular, D, BD, BM, BIAS, True, ROWS, PRECISION,
                STAGES,
            )  # fmt: skip
            tl.debug_barrier()  # all warps have written their marks
            count += write_key_bits(p_edge_marks, p_edges, -1, 0, n_edge_marked, p_key_words)
            sparse = is_sparse(count, marked + n_edge_marked)
            tl.store(p_sparse + i_tile, sparse.to(tl.uint8))
            if sparse:
                inner_keys, edge_keys = list_row_keys(
                    p_key_words,
                    p_keys,
                    tile_lo * BM,
                    tl.minimum(tile_hi * BM, n_keys),
                    inner_lo * BM,
                    inner_hi * BM,
                    key_capacity,
                )
                tau, step, norm_slope = refine_over_keys(
                    q, p_k_head, stride_kt, p_keys, inner_keys, edge_keys, key_capacity, tau, alpha, beta, z_scale,
                    slope, tolerance, first, end, position, i_block * BM + tl.load(p_block + 4),
                    D, BD, BM, MAX_STEPS, BIAS, PRECISION, POWER, STAGES,
                )  # fmt: skip
            else:
                if ROWS:
                    fill_rows(p_head_rows, p_words, tile_lo, tile_hi, row, inside, n_queries, triangular)
                tau, step, norm_slope, _, n_inner, n_edge = refine_over_tiles(
                    q, p_k_head, stride_kt, p_list, n_inner, n_edge, capacity, p_marks, tau, alpha, beta, z_scale,
                    slope, tolerance, first, end, position, n_keys,
                    D, BD, BM, LIST_CHUNK, MAX_STEPS, BIAS, PRECISION, POWER, STAGES,
                )  # fmt: skip
                keep_listed(
                    p_list, p_flags, p_words, n_inner, n_edge, tau, tile_lo, tile_hi, n_words, capacity, LIST_CHUNK
                )
        else:
            tau, step, norm_slope, passes, n_inner, n_edge = refine_over_tiles(
                q, p_k_head, stride_kt, p_list, n_inner, n_edge, capacity, p_marks, tau, alpha, beta, z_scale,
                slope, tolerance, first, end, position, n_keys,
                D, BD, BM, LIST_CHUNK, MAX_STEPS, BIAS, PRECISION, POWER, STAGES,
            )  # fmt: skip
            keep_listed(p_list, p_flags, p_words, n_inner, n_edge, tau, tile_lo, tile_hi, n_words, capacity, LIST_CHUNK)

        tl.store(p_tau + o_bh + row, tau, mask=inside)
        tl.store(p_last + o_bh + row, norm_slope, mask=inside)
        tl.store(p_last + stride_last + o_bh + row, step, mask=inside)
        if STATS:
            tl.store(p_passes + i_bh * n_blocks + i_block, passes + 1)
        tl.debug_barrier()  # the next task lists anew
        task = tl.atomic_add(p_counter, 1)
