"""The weighted sum of values over the tiles or the keys that hold support, with the last step of the threshold."""

import triton
import triton.language as tl

from kernels.alpha_entmax.threshold import curved_step, lane_sums, norm_and_slope, support_distance, support_power
from kernels.common.key_lists import gather_rows, key_scores, key_words, list_row_keys, step_entries
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
    store_rows,
)


@triton.jit
def add_values(
    x, v, power_sum, slope_sum, out, slope_out, tau, z_scale, beta, PRECISION: tl.constexpr, POWER: tl.constexpr
):  # fmt: skip
    """Adds sum u ** beta, sum u ** (beta - 1), and with the same weights sum u ** beta v and sum u ** (beta - 1) v of
    one step. Returns them, u and the step's sum u ** (beta - 1)."""
    u = support_distance(x, z_scale, tau[:, None])
    w = support_power(u, beta, POWER)
    p = w * u
    power_sum += lane_sums(p)
    step_slope_sum = lane_sums(w)
    slope_sum += step_slope_sum
    out = tl.dot(p.to(v.dtype), v, out, input_precision=PRECISION)
    slope_out = tl.dot(w.to(v.dtype), v, slope_out, input_precision=PRECISION)
    return power_sum, slope_sum, out, slope_out, u, step_slope_sum


@triton.jit
def sum_tiles(
    q, p_k, p_v, stride_k, stride_v, p_list, list_step, count, p_marks,
    power_sum, slope_sum, out, slope_out, support, tau, z_scale, beta, slope, first, end, position, n_keys,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, STEP: tl.constexpr,
    BIAS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, POWER: tl.constexpr,
    STATS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """add_values over a list of tiles, STEP keys at a time; counts support and marks tiles with weight if STATS."""
    PARTS: tl.constexpr = BM // STEP
    marks = tl.zeros([BM], tl.int32)
    for n in tl.range(0, count * PARTS, num_stages=STAGES):
        part = tl.load(p_list + n // PARTS * list_step) * PARTS + n % PARTS
        x = listed_scores(
            q, p_k, stride_k, part, slope, first, end, position, n_keys, D, BD, STEP, BIAS, MASKED, PRECISION
        )
        v = load_rows(p_v, part * STEP, stride_v, n_keys, STEP, D, BD, MASKED)
        power_sum, slope_sum, out, slope_out, u, step_slope_sum = add_values(
            x, v, power_sum, slope_sum, out, slope_out, tau, z_scale, beta, PRECISION, POWER
        )
        if STATS:
            marks = mark_listed(p_marks, marks, tl.sum(step_slope_sum, 1) > 0, n, count * PARTS, PARTS)
            support += tl.sum((u > 0).to(tl.int32), 1)
    return power_sum, slope_sum, out, slope_out, support


@triton.jit
def sum_keys(
    q, p_k, p_v, stride_k, stride_v, p_list, first_step, last_step, n_inner, count, capacity,
    power_sum, slope_sum, out, slope_out, tau, z_scale, beta, slope, first, end, position, anchor,
    D: tl.constexpr, BD: tl.constexpr, STEP: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, POWER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """add_values over steps of a list of keys."""
    for n in tl.range(first_step, last_step, num_stages=STAGES):
        key = step_entries(p_list, n, n_inner, count, capacity, STEP, MASKED)
        x, _ = key_scores(q, p_k, stride_k, key, slope, first, end, position, anchor, D, BD, BIAS, MASKED, PRECISION)
        v = gather_rows(p_v, key, stride_v, D, BD, MASKED)
        power_sum, slope_sum, out, slope_out, _, _ = add_values(
            x, v, power_sum, slope_sum, out, slope_out, tau, z_scale, beta, PRECISION, POWER
        )
    return power_sum, slope_sum, out, slope_out


@triton.jit(do_not_specialize=LENGTHS)
def entmax_sum(
    p_q, p_k, p_v, p_alpha, p_slopes, p_rows, p_blocks, p_flags, p_list, p_keys, p_marks, p_counter, p_tau, p_bits,
    p_key_bits, p_sparse, p_last, p_out, p_final_tau, p_support, p_live,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot,
    stride_last, stride_key_bits, scale, heads, repeat, n_queries, n_keys, n_tasks, n_blocks, n_words, n_key_words,
    triangular, capacity, key_capacity, batch_step, stride_rows,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, STEP: tl.constexpr, LIST_CHUNK: tl.constexpr,
    FIELDS: tl.constexpr,
    BIAS: tl.constexpr, POWER: tl.constexpr, PRECISION: tl.constexpr,
    STATS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Programs take query tiles from a counter until none is left, long ones first within a head. p_tau and p_bits
    hold the refinement's; p_final_tau and, if STATS, p_bits get the final ones (else a tile may be marked whose best
    key lies in the last step). KEYS, p_key_bits, p_sparse: as in entmax_refine; not with STATS. Long as
    entmax_scan is."""
    i_program = tl.program_id(0)
    p_list += i_program * capacity
    if KEYS:
        p_keys += i_program * key_capacity
    if STATS:
        p_flags += i_program * capacity
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
        o_v = head_offset(i_batch, i_head // repeat, stride_vb, stride_vh)
        o_q = head_offset(i_batch, i_head, stride_qb, stride_qh)
        q = load_rows(p_q + o_q, i_block * BM, stride_qt, n_queries, BM, D, BD, True)  # [BM, BD]

        o_bh = i_bh.to(tl.int64) * n_queries
        tau = tl.load(p_tau + o_bh + row, mask=inside, other=float("inf"))  # [BM]
        nan = tau != tau
        i_tile = i_bh.to(tl.int64) * n_blocks + i_block
        p_words = p_bits + i_tile * n_words
        p_k_head, p_v_head = p_k + o_k, p_v + o_v

        # Weighted sums; the last step of the threshold is applied to them to first order
        out = tl.zeros([BM, BD], tl.float32)
        slope_out = tl.zeros([BM, BD], tl.float32)
        support = tl.zeros([BM], tl.int32)
        power_sum = tl.zeros([BM, 4], tl.float32)
        slope_sum = tl.zeros([BM, 4], tl.float32)
        whole_tiles = True
        if KEYS:
            whole_tiles = tl.load(p_sparse + i_tile) == 0
            if not whole_tiles:
                p_key_words = key_words(p_key_bits, i_bh, i_block, stride_key_bits, n_key_words, triangular)
                n_inner, n_edge = list_row_keys(
                    p_key_words, p_keys, tile_lo * BM, tl.minimum(tile_hi * BM, n_keys), inner_lo * BM, inner_hi * BM,
                    key_capacity,
                )  # fmt: skip
                whole, count = n_inner // STEP, n_inner + n_edge
                anchor = i_block * BM + tl.load(p_block + 4)
                power_sum, slope_sum, out, slope_out = sum_keys(
                    q, p_k_head, p_v_head, stride_kt, stride_vt, p_keys, 0, whole, n_inner, count, key_capacity,
                    power_sum, slope_sum, out, slope_out, tau, z_scale, beta, slope, first, end, position, anchor,
                    D, BD, STEP, BIAS, False, PRECISION, POWER, STAGES,
                )  # fmt: skip
                power_sum, slope_sum, out, slope_out = sum_keys(
                    q, p_k_head, p_v_head, stride_kt, stride_vt, p_keys, whole, tl.cdiv(count, STEP), n_inner, count,
                    key_capacity, power_sum, slope_sum, out, slope_out, tau, z_scale, beta, slope, first, end,
                    position, anchor, D, BD, STEP, BIAS, True, PRECISION, POWER, STAGES,
                )  # fmt: skip
        n_inner, n_edge = 0, 0
        if whole_tiles:
            n_inner, n_edge = list_row_tiles(
                p_words, p_list, tile_lo, tile_hi, inner_lo, inner_hi, capacity, LIST_CHUNK
            )  # fmt: skip
        p_edge_marks = p_marks
        if STATS:
            p_edge_marks += tl.cdiv(n_inner, 32)
        power_sum, slope_sum, out, slope_out, support = sum_tiles(
            q, p_k_head, p_v_head, stride_kt, stride_vt, p_list, 1, n_inner, p_marks, power_sum, slope_sum, out,
            slope_out, support, tau, z_scale, beta, slope, first, end, position, n_keys, D, BD, BM, STEP, BIAS, False,
            PRECISION, POWER, STATS, STAGES,
        )  # fmt: skip
        power_sum, slope_sum, out, slope_out, support = sum_tiles(
            q, p_k_head, p_v_head, stride_kt, stride_vt, p_list + capacity - 1, -1, n_edge, p_edge_marks, power_sum,
            slope_sum, out, slope_out, support, tau, z_scale, beta, slope, first, end, position, n_keys, D, BD, BM,
            STEP, BIAS, True, PRECISION, POWER, STATS, STAGES,
        )  # fmt: skip
        total, slope_total = tl.sum(power_sum, 1), tl.sum(slope_sum, 1)
        norm, last_slope = norm_and_slope(total, slope_total, alpha, POWER)
        earlier_slope = tl.load(p_last + o_bh + row, mask=inside, other=0.0)
        earlier_step = tl.load(p_last + stride_last + o_bh + row, mask=inside, other=0.0)
        step = curved_step(norm, last_slope, earlier_slope, earlier_step, alpha)
        tau += step
        tl.store(p_final_tau + o_bh + row, tau, mask=inside)
        out -= (beta * step)[:, None] * slope_out
        total -= beta * step * slope_total
        if STATS:
            n_inner, n_edge = (
                keep_marked(p_list, 1, p_marks, n_inner, LIST_CHUNK),
                keep_marked(p_list + capacity - 1, -1, p_edge_marks, n_edge, LIST_CHUNK),
            )
            flag_listed(p_list, 1, p_flags, n_inner, LIST_CHUNK)
            flag_listed(p_list + capacity - 1, -1, p_flags, n_edge, LIST_CHUNK)
            tl.debug_barrier()  # all warps have written their flags
            any_nan = tl.max(nan.to(tl.int32), 0) > 0
            store_live_bits(p_flags, p_words, tile_lo, tile_hi, n_words, any_nan, p_live + i_bh, True, LIST_CHUNK)
            tl.store(p_support + o_bh + row, support, mask=inside)
        out = tl.where(nan[:, None], float("nan"), out / tl.where(total > 0, total, 1.0)[:, None])
        o_o = head_offset(i_batch, i_head, stride_ob, stride_oh)
        store_rows(p_out + o_o, out, i_block * BM, stride_ot, n_queries, BM, D, BD)
        tl.debug_barrier()  # the next task lists anew
        task = tl.atomic_add(p_counter, 1)
