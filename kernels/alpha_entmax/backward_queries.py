"""The backward pass over queries: dq, dalpha and delta, over the tiles or keys with weight only.

Per tile: dP = dO v^T, ds = w (dP - delta), with delta = sum w dP / sum w. The pass finds delta while it sums: it takes
dO . out, the mean of dP with weights p, in its place, and mends dq by sum w k times the difference. So dq, dk and
dalpha rest on the same w, and nothing but out and tau is kept for them.
"""

import triton
import triton.language as tl

from kernels.alpha_entmax.threshold import lane_sums, support_distance, support_power, support_power_and_log
from kernels.common.key_lists import gather_rows, key_scores, key_words, list_row_keys, step_entries
from kernels.common.tiles import (
    LENGTHS,
    add_position_bias,
    head_offset,
    head_scales,
    is_visible,
    list_row_tiles,
    load_rows,
    query_task,
    store_rows,
)


@triton.jit
def add_query_gradients(
    q, do, p_k, p_v, stride_k, stride_v, p_list, list_step, first_step, last_step, n_inner, count, capacity,
    dq, slope_keys, slope_sum, slope_dp, entropy_sum, entropy_dp,
    tau, delta, z_scale, beta, slope, first, end, position, anchor, n_keys,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, STEP: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, POWER: tl.constexpr, DALPHA: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds w (dP - delta) k and w k of the listed key tiles (KEYS: keys), STEP keys at a time, sum w and
    sum w (dP - delta), and (if DALPHA), with e = p (1 - log u), sum e and sum e (dP - delta)."""
    PARTS: tl.constexpr = BM // STEP
    for n in tl.range(first_step, last_step, num_stages=STAGES):
        if KEYS:
            key = step_entries(p_list, n, n_inner, count, capacity, STEP, MASKED)
            x, k = key_scores(
                q, p_k, stride_k, key, slope, first, end, position, anchor, D, BD, BIAS, MASKED, PRECISION
            )  # fmt: skip
            v = gather_rows(p_v, key, stride_v, D, BD, MASKED)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        else:
            start = tl.load(p_list + n // PARTS * list_step) * BM + n % PARTS * STEP
            k = load_rows(p_k, start, stride_k, n_keys, STEP, D, BD, MASKED)
            v = load_rows(p_v, start, stride_v, n_keys, STEP, D, BD, MASKED)
            x = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BM queries, STEP keys]
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            key = start + tl.arange(0, STEP)
            if BIAS:
                x = add_position_bias(x, position[:, None], key[None, :], start, slope)
            if MASKED:
                x = tl.where(is_visible(key[None, :], first[:, None], end[:, None]), x, float("-inf"))
        u = support_distance(x, z_scale, tau[:, None])
        dp -= delta[:, None]
        if DALPHA:
            w, log_u = support_power_and_log(u, beta, POWER)
            share = u * (1 - 0.6931471805599453 * log_u)  # e / w
        else:
            w = support_power(u, beta, POWER)
        ds = w * dp
        slope_sum += lane_sums(w)
        slope_dp += lane_sums(ds)
        if DALPHA:
            entropy_sum += lane_sums(w * share)
            entropy_dp += lane_sums(ds * share)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        slope_keys = tl.dot(w.to(k.dtype), k, slope_keys, input_precision=PRECISION)
    return dq, slope_keys, slope_sum, slope_dp, entropy_sum, entropy_dp


@triton.jit(do_not_specialize=LENGTHS)
def entmax_backward_queries(
    p_q, p_k, p_v, p_do, p_out, p_tau, p_alpha, p_slopes, p_rows, p_blocks, p_bits, p_key_bits, p_sparse, p_list,
    p_entries, p_counter,
    p_dq, p_delta, p_dalpha,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, stride_sb, stride_sh, stride_st, stride_db, stride_dh, stride_dt,
    stride_key_bits, scale, heads, repeat, n_queries, n_keys, n_tasks, n_blocks, n_words, n_key_words, triangular,
    capacity, key_capacity, batch_step, stride_rows,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, LIST_CHUNK: tl.constexpr, FIELDS: tl.constexpr,
    STEP: tl.constexpr, BIAS: tl.constexpr, POWER: tl.constexpr, PRECISION: tl.constexpr, DALPHA: tl.constexpr,
    KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq, delta and each query tile's part of dalpha. Programs take query tiles from a counter until none is left.
    KEYS, p_key_bits, p_sparse: as in entmax_refine. Long as entmax_scan is."""
    PARTS: tl.constexpr = BM // STEP
    p_list += tl.program_id(0) * capacity
    if KEYS:
        p_entries += tl.program_id(0) * key_capacity
    task = tl.atomic_add(p_counter, 1)
    while task < n_tasks:
        i_bh, i_batch, i_head, i_block, row, inside, position, first, end, p_block = query_task(
            task, p_rows, p_blocks, heads, n_queries, n_blocks, batch_step, stride_rows, BM, FIELDS
        )
        o_bh = i_bh.to(tl.int64) * n_queries
        i_tile = i_bh.to(tl.int64) * n_blocks + i_block
        tile_lo, tile_hi = tl.load(p_block), tl.load(p_block + 1)
        inner_lo, inner_hi = tl.load(p_block + 2), tl.load(p_block + 3)
        whole_tiles = True
        if KEYS:
            whole_tiles = tl.load(p_sparse + i_tile) == 0
        n_inner, n_edge = 0, 0
        if whole_tiles:
            n_inner, n_edge = list_row_tiles(
                p_bits + i_tile * n_words, p_list, tile_lo, tile_hi, inner_lo, inner_hi, capacity, LIST_CHUNK
            )

        alpha, beta, z_scale, slope = head_scales(p_alpha, p_slopes, i_head, scale, BIAS)
        o_k = head_offset(i_batch, i_head // repeat, stride_kb, stride_kh)
        o_v = head_offset(i_batch, i_head // repeat, stride_vb, stride_vh)
        o_q = head_offset(i_batch, i_head, stride_qb, stride_qh)
        o_o = head_offset(i_batch, i_head, stride_ob, stride_oh)
        o_s = head_offset(i_batch, i_head, stride_sb, stride_sh)
        q = load_rows(p_q + o_q, i_block * BM, stride_qt, n_queries, BM, D, BD, True)
        do = load_rows(p_do + o_o, i_block * BM, stride_ot, n_queries, BM, D, BD, True)
        out = load_rows(p_out + o_s, i_block * BM, stride_st, n_queries, BM, D, BD, True)
        delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)  # [BM], the mean of dP with weights p, for now
        tau = tl.load(p_tau + o_bh + row, mask=inside, other=float("inf"))

        dq, slope_keys = tl.zeros([BM, BD], tl.float32), tl.zeros([BM, BD], tl.float32)
        slope_sum, slope_dp = tl.zeros([BM, 4], tl.float32), tl.zeros([BM, 4], tl.float32)
        entropy_sum, entropy_dp = tl.zeros([BM, 4], tl.float32), tl.zeros([BM, 4], tl.float32)
        dq, slope_keys, slope_sum, slope_dp, entropy_sum, entropy_dp = add_query_gradients(
            q, do, p_k + o_k, p_v + o_v, stride_kt, stride_vt, p_list, 1, 0, n_inner * PARTS, 0, 0, capacity,
            dq, slope_keys, slope_sum, slope_dp, entropy_sum, entropy_dp, tau, delta, z_scale, beta, slope, first, end,
            position, 0, n_keys, D, BD, BM, STEP, BIAS, False, PRECISION, POWER, DALPHA, False, STAGES,
        )  # fmt: skip
        dq, slope_keys, slope_sum, slope_dp, entropy_sum, entropy_dp = add_query_gradients(
            q, do, p_k + o_k, p_v + o_v, stride_kt, stride_vt, p_list + capacity - 1, -1, 0, n_edge * PARTS, 0, 0,
            capacity, dq, slope_keys, slope_sum, slope_dp, entropy_sum, entropy_dp, tau, delta, z_scale, beta, slope,
            first, end, position, 0, n_keys, D, BD, BM, STEP, BIAS, True, PRECISION, POWER, DALPHA, False, STAGES,
        )  # fmt: skip
        if KEYS:
            n_inner, n_edge = 0, 0
            if not whole_tiles:
                p_key_words = key_words(p_key_bits, i_bh, i_block, stride_key_bits, n_key_words, triangular)
                n_inner, n_edge = list_row_keys(
                    p_key_words, p_entries, tile_lo * BM, tl.minimum(tile_hi * BM, n_keys), inner_lo * BM,
                    inner_hi * BM, key_capacity,
                )  # fmt: skip
            whole, count = n_inner // STEP, n_inner + n_edge
            anchor = i_block * BM + tl.load(p_block + 4)
            dq, slope_keys, slope_sum, slope_dp, entropy_sum, entropy_dp = add_query_gradients(
                q, do, p_k + o_k, p_v + o_v, stride_kt, stride_vt, p_entries, 1, 0, whole, n_inner, count,
                key_capacity, dq, slope_keys, slope_sum, slope_dp, entropy_sum, entropy_dp, tau, delta, z_scale, beta,
                slope, first, end, position, anchor, n_keys,
                D, BD, BM, STEP, BIAS, False, PRECISION, POWER, DALPHA, True, STAGES,
            )  # fmt: skip
            dq, slope_keys, slope_sum, slope_dp, entropy_sum, entropy_dp = add_query_gradients(
                q, do, p_k + o_k, p_v + o_v, stride_kt, stride_vt, p_entries, 1, whole, tl.cdiv(count, STEP), n_inner,
                count, key_capacity, dq, slope_keys, slope_sum, slope_dp, entropy_sum, entropy_dp, tau, delta, z_scale,
                beta, slope, first, end, position, anchor, n_keys,
                D, BD, BM, STEP, BIAS, True, PRECISION, POWER, DALPHA, True, STAGES,
            )  # fmt: skip
        o_d = head_offset(i_batch, i_head, stride_db, stride_dh)
        total = tl.sum(slope_sum, 1)
        shift = tl.sum(slope_dp, 1) / tl.where(total > 0, total, 1.0)  # to the mean with weights w
        tl.store(p_delta + o_bh + row, delta + shift, mask=inside)
        dq = (dq - shift[:, None] * slope_keys) * scale
        dq = tl.where((tau != tau)[:, None], float("nan"), dq)
        store_rows(p_dq + o_d, dq, i_block * BM, stride_dt, n_queries, BM, D, BD)
        if DALPHA:
            dalpha = beta * beta * tl.sum(tl.sum(entropy_dp, 1) - shift * tl.sum(entropy_sum, 1), 0)
            dalpha = tl.where(tl.max((tau != tau).to(tl.int32), 0) > 0, float("nan"), dalpha)
            tl.store(p_dalpha + i_bh * n_blocks + i_block, dalpha)
        tl.debug_barrier()  # the next task overwrites the list
        task = tl.atomic_add(p_counter, 1)
