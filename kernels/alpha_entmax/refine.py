"""Refinement: brings the scan's bounds to the threshold, over marked tiles only, and unmarks tiles below it."""

import triton
import triton.language as tl

from kernels.alpha_entmax.threshold import newton_step, norm_and_slope, step_limit, support_distance, support_power
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
        marks = mark_listed(p_marks, marks, tile_slope_sum > 0, n, count)
    return power_sum, slope_sum


@triton.jit(do_not_specialize=LENGTHS)
def entmax_refine(
    p_q, p_k, p_alpha, p_slopes, p_rows, p_blocks, p_flags, p_list, p_marks, p_counter, p_tau, p_bits, p_last, p_passes,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_last,
    scale, tolerance, heads, repeat, n_queries, n_keys, n_tasks, n_blocks, n_words, capacity, batch_step, stride_rows,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, LIST_CHUNK: tl.constexpr, FIELDS: tl.constexpr,
    MAX_STEPS: tl.constexpr, BIAS: tl.constexpr, POWER: tl.constexpr, PRECISION: tl.constexpr, STATS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Programs take query tiles from a counter until none is left, long ones first within a head. p_tau and p_bits
    hold the scan's and get better ones.

    p_last: float32 (2, B, H, Tq), slope of N where the last step was taken from, and that step (see threshold.py).
    """
    i_program = tl.program_id(0)
    p_flags += i_program * capacity
    p_list += i_program * capacity
    p_marks += i_program * (capacity // 32 + 2)
    task = tl.atomic_add(p_counter, 1)
    while task < n_tasks:
        i_bh, i_batch, i_head, i_block, row, inside, position, first, end, p_block = query_task(
            task, p_rows, p_blocks, heads, n_queries, n_blocks, batch_step, stride_rows, BM, FIELDS
        )
        tile_lo, tile_hi = tl.load(p_block), tl.load(p_block + 1)
        inner_lo, inner_hi = tl.load(p_block + 2), tl.load(p_block + 3)

        alpha, beta, z_scale, slope = head_scales(p_alpha, p_slopes, i_head, scale, BIAS)
        o_k = head_offset(i_batch, i_head // repeat, stride_kb, stride_kh)
        o_q = head_offset(i_batch, i_head, stride_qb, stride_qh)
        q = load_rows(p_q + o_q, i_block * BM, stride_qt, n_queries, BM, D, BD, True)  # [BM, BD]

        o_bh = i_bh.to(tl.int64) * n_queries
        tau = tl.load(p_tau + o_bh + row, mask=inside, other=float("inf"))  # [BM]
        p_words = p_bits + (i_bh.to(tl.int64) * n_blocks + i_block) * n_words
        n_inner, n_edge = list_row_tiles(
            p_words, p_list, tile_lo, tile_hi, inner_lo, inner_hi, capacity, LIST_CHUNK
        )  # fmt: skip

        # Newton's error squares: after a step of the limit the next is about its square
        limit = step_limit(alpha, tolerance)
        passes = 0
        norm_slope = tl.full([BM], 1.0, tl.float32)
        step = tl.full([BM], 1.0, tl.float32)
        while (tl.max(tl.where(norm_slope > 0, step, 0.0), 0) > limit) & (passes < MAX_STEPS):
            power_sum = tl.zeros([BM], tl.float32)
            slope_sum = tl.zeros([BM], tl.float32)
            power_sum, slope_sum = sum_powers(
                q, p_k + o_k, stride_kt, p_list, 1, n_inner, p_marks, power_sum, slope_sum, tau, z_scale, beta, slope,
                first, end, position, n_keys, D, BD, BM, BIAS, False, PRECISION, POWER, STAGES,
            )  # fmt: skip
            power_sum, slope_sum = sum_powers(
                q, p_k + o_k, stride_kt, p_list + capacity - 1, -1, n_edge, p_marks + tl.cdiv(n_inner, 32),
                power_sum, slope_sum, tau, z_scale,
                beta, slope, first, end, position, n_keys, D, BD, BM, BIAS, True, PRECISION, POWER, STAGES,
            )  # fmt: skip
            norm, norm_slope = norm_and_slope(power_sum, slope_sum, alpha, POWER)
            step = tl.maximum(newton_step(norm, norm_slope), 0.0)
            tau += step
            passes += 1
            n_inner, n_edge = (
                keep_marked(p_list, 1, p_marks, n_inner, LIST_CHUNK),
                keep_marked(p_list + capacity - 1, -1, p_marks + tl.cdiv(n_inner, 32), n_edge, LIST_CHUNK),
            )

        tl.store(p_tau + o_bh + row, tau, mask=inside)
        tl.store(p_last + o_bh + row, norm_slope, mask=inside)
        tl.store(p_last + stride_last + o_bh + row, step, mask=inside)
        flag_listed(p_list, 1, p_flags, n_inner, LIST_CHUNK)
        flag_listed(p_list + capacity - 1, -1, p_flags, n_edge, LIST_CHUNK)
        tl.debug_barrier()  # all warps have written their flags
        any_nan = tl.max((tau != tau).to(tl.int32), 0) > 0
        store_live_bits(p_flags, p_words, tile_lo, tile_hi, n_words, any_nan, None, False, LIST_CHUNK)
        if STATS:
            tl.store(p_passes + i_bh * n_blocks + i_block, passes + 1)
        tl.debug_barrier()  # the next task lists anew
        task = tl.atomic_add(p_counter, 1)
