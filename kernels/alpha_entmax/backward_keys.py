"""The backward pass over keys: dk and dv, over the tiles or queries with weight only. No atomics on floats: the same
inputs give the same bits.

Per tile: dP = dO v^T, ds = w (dP - delta), with delta of the pass over queries.
"""

import triton
import triton.language as tl

from kernels.alpha_entmax.column_plan import CUT_FIELDS, PLAN_FIELDS, column_steps
from kernels.alpha_entmax.threshold import support_distance, support_power
from kernels.common.key_lists import append_bits, gather_rows, row_words, step_entries
from kernels.common.tiles import (
    LENGTHS,
    add_position_bias,
    append_entries,
    head_offset,
    head_scales,
    is_visible,
    load_rows,
    store_rows,
)

ROWS_AT_ONCE = tl.constexpr(4096)  # queries examined at once when a list is built


@triton.jit
def list_column_tiles(
    p_bits, p_blocks, p_list, i_key_block, n_queries, n_blocks, n_words, capacity,
    BM: tl.constexpr, CHUNK: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """Lists the query tiles that have support in one key tile. Returns how many are inner (and whole), how many
    edges."""
    n_inner, n_edge = 0, 0
    for start in range(0, n_blocks, CHUNK):
        i_block = start + tl.arange(0, CHUNK)
        word = tl.load(p_bits + i_block.to(tl.int64) * n_words + i_key_block // 32, mask=i_block < n_blocks, other=0)
        live = ((word >> (i_key_block % 32)) & 1) != 0
        inner = is_inner(p_blocks, i_block, live, i_key_block, n_queries, BM, FIELDS)
        n_inner, n_edge = append_entries(p_list, i_block, live, inner, n_inner, n_edge, capacity)
    tl.debug_barrier()
    return n_inner, n_edge


@triton.jit
def is_inner(p_blocks, i_block, mask, i_key_block, n_queries, BM: tl.constexpr, FIELDS: tl.constexpr):
    """Whether query tiles are whole and all their rows see all of the key tile."""
    inner_lo = tl.load(p_blocks + i_block * FIELDS + 2, mask=mask, other=0)
    inner_hi = tl.load(p_blocks + i_block * FIELDS + 3, mask=mask, other=0)
    return (i_key_block >= inner_lo) & (i_key_block < inner_hi) & ((i_block + 1) * BM <= n_queries)


@triton.jit
def list_column_queries(
    p_column_words, p_blocks, p_list, i_key_block, n_queries, n_blocks, capacity,
    BM: tl.constexpr, LIST_CHUNK: tl.constexpr, CHUNK: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """Lists the queries that have weight on a key of one tile. Returns how many stand in inner query tiles, how many in
    edges."""
    lo, hi = n_blocks, 0  # query tiles that can see it
    for start in range(0, n_blocks, LIST_CHUNK):
        i_block = start + tl.arange(0, LIST_CHUNK)
        tile_lo = tl.load(p_blocks + i_block * FIELDS, mask=i_block < n_blocks, other=0)
        tile_hi = tl.load(p_blocks + i_block * FIELDS + 1, mask=i_block < n_blocks, other=0)
        sees = (tile_lo <= i_key_block) & (i_key_block < tile_hi)
        lo = tl.minimum(lo, tl.min(tl.where(sees, i_block, n_blocks), 0))
        hi = tl.maximum(hi, tl.max(tl.where(sees, i_block + 1, 0), 0))
    n_inner, n_edge = 0, 0
    for start in range(lo * BM, tl.minimum(hi * BM, n_queries), CHUNK):
        row = start + tl.arange(0, CHUNK)
        bit = (tl.load(p_column_words + row, mask=row < n_queries, other=0) >> (i_key_block % 32)) & 1
        word = tl.sum(tl.reshape(bit << (row % 32), (CHUNK // 32, 32)), 1)  # words of 32 queries
        first_row = start + 32 * tl.arange(0, CHUNK // 32)
        inner = is_inner(p_blocks, first_row // BM, word != 0, i_key_block, n_queries, BM, FIELDS)
        n_inner, n_edge = append_bits(p_list, word, first_row, inner, n_inner, n_edge, capacity)
    tl.debug_barrier()
    return n_inner, n_edge


@triton.jit
def add_key_gradients(
    k, v, key, p_q, p_do, stride_q, stride_o, p_tau, p_delta, p_first, p_end, p_list, list_step, first_step, last_step,
    n_inner, count, capacity, dk, dv, broken,
    z_scale, beta, slope, offset, n_queries,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, STEP: tl.constexpr, TRANSPOSED: tl.constexpr,
    BIAS: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, POWER: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds ds^T q and p^T dO of the listed query tiles (KEYS: queries), STEP queries at a time. Tiles are
    [queries, keys], where what belongs to a query is two numbers a thread, or TRANSPOSED, where products need no second
    transposition. Long as entmax_scan is."""
    PARTS: tl.constexpr = BM // STEP
    for n in tl.range(first_step, last_step, num_stages=STAGES):
        if KEYS:
            row = step_entries(p_list, n, n_inner, count, capacity, STEP, MASKED)
            q = gather_rows(p_q, row, stride_q, D, BD, MASKED)
            do = gather_rows(p_do, row, stride_o, D, BD, MASKED)
            inside = row >= 0
        else:
            start = tl.load(p_list + n // PARTS * list_step) * BM + n % PARTS * STEP
            q = load_rows(p_q, start, stride_q, n_queries, STEP, D, BD, MASKED)
            do = load_rows(p_do, start, stride_o, n_queries, STEP, D, BD, MASKED)
            row = start + tl.arange(0, STEP)
            inside = row < n_queries
        if MASKED:
            tau = tl.load(p_tau + row, mask=inside, other=float("inf"))
            delta = tl.load(p_delta + row, mask=inside, other=0.0)
            first = tl.load(p_first + row, mask=inside, other=0)
            end = tl.load(p_end + row, mask=inside, other=0)
        else:
            tau = tl.load(p_tau + row)
            delta = tl.load(p_delta + row)
        if TRANSPOSED:
            x = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BM keys, STEP queries]
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            if BIAS:
                x = add_position_bias(x, (row + offset)[None, :], key[:, None], tl.min(key, 0), slope)
            if MASKED:
                x = tl.where(is_visible(key[:, None], first[None, :], end[None, :]), x, float("-inf"))
            u = support_distance(x, z_scale, tau[None, :])
            dp -= delta[None, :]
        else:
            x = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [STEP queries, BM keys]
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            if BIAS:
                x = add_position_bias(x, (row + offset)[:, None], key[None, :], tl.min(key, 0), slope)
            if MASKED:
                x = tl.where(is_visible(key[None, :], first[:, None], end[:, None]), x, float("-inf"))
            u = support_distance(x, z_scale, tau[:, None])
            dp -= delta[:, None]
        w = support_power(u, beta, POWER)
        p = (w * u).to(do.dtype)
        ds = (w * dp).to(q.dtype)
        if TRANSPOSED:
            dv = tl.dot(p, do, dv, input_precision=PRECISION)
            dk = tl.dot(ds, q, dk, input_precision=PRECISION)
        else:
            dv = tl.dot(tl.trans(p), do, dv, input_precision=PRECISION)
            dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
        broken += (tau != tau).to(tl.int32)
    return dk, dv, broken


@triton.jit(do_not_specialize=LENGTHS)
def entmax_backward_keys(
    p_q, p_k, p_v, p_do, p_tau, p_delta, p_alpha, p_slopes, p_rows, p_blocks, p_bits, p_row_bits, p_list,
    p_entries, p_counter, p_tile_counts, p_query_counts, p_parts, p_cuts, p_n_parts, p_sums, p_dk, p_dv,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, stride_db, stride_dh, stride_dt, stride_eb, stride_eh, stride_et,
    scale, heads, repeat, n_queries, n_keys, n_items, n_blocks, n_key_blocks, n_words, capacity, key_capacity,
    batch_step, stride_rows, stride_row_bits, triangular,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, LIST_CHUNK: tl.constexpr, FIELDS: tl.constexpr,
    STEP: tl.constexpr, TRANSPOSED: tl.constexpr, BIAS: tl.constexpr, POWER: tl.constexpr, PRECISION: tl.constexpr,
    KEYS: tl.constexpr, PLANNED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv, summed over the query heads that share a key head. Programs take items from a counter; if PLANNED, the
    parts of those that were cut first (column_plan.py), whose sums go to p_sums. KEYS: over the queries of p_row_bits
    where they are few of those in the query tiles of p_bits. Long as entmax_scan is."""
    PARTS: tl.constexpr = BM // STEP
    p_list += tl.program_id(0) * capacity
    if KEYS:
        p_entries += tl.program_id(0) * key_capacity
    n_parts = 0
    if PLANNED:
        n_parts = tl.load(p_n_parts)
    groups = heads // repeat
    task = tl.atomic_add(p_counter, 1)
    while task < n_parts + n_items:
        item, first_step, stop_step = task - n_parts, 0, 2147483647
        if PLANNED:
            if task < n_parts:
                item = tl.load(p_parts + task * PLAN_FIELDS)
                first_step = tl.load(p_parts + task * PLAN_FIELDS + 1)
                stop_step = tl.load(p_parts + task * PLAN_FIELDS + 2)
            elif tl.load(p_cuts + item * CUT_FIELDS + 1) > 0:
                stop_step = 0  # its parts are tasks of their own
        i_bg, i_key_block = item // n_key_blocks, item % n_key_blocks
        i_batch, i_group = i_bg // groups, i_bg % groups
        key = i_key_block * BM + tl.arange(0, BM)
        o_k = head_offset(i_batch, i_group, stride_kb, stride_kh)
        o_v = head_offset(i_batch, i_group, stride_vb, stride_vh)
        k = load_rows(p_k + o_k, i_key_block * BM, stride_kt, n_keys, BM, D, BD, True)
        v = load_rows(p_v + o_v, i_key_block * BM, stride_vt, n_keys, BM, D, BD, True)
        p_block = p_blocks + i_batch * batch_step * n_blocks * FIELDS
        offset = tl.load(p_block + 4)
        p_first = p_rows + i_batch * batch_step * n_queries
        dk, dv = tl.zeros([BM, BD], tl.float32), tl.zeros([BM, BD], tl.float32)
        broken = tl.zeros([STEP], tl.int32)  # queries with a NaN score spoil the keys they see, as in softmax
        before = 0  # steps of the heads before
        for i_repeat in range(0, repeat):
            i_head = i_group * repeat + i_repeat
            i_bh = (i_batch * heads + i_head).to(tl.int64)
            steps, sparse = 2147483647, False
            if PLANNED:
                steps, sparse = column_steps(
                    p_tile_counts, p_query_counts, i_bh * n_key_blocks + i_key_block, BM, STEP, KEYS
                )
            first_one, stop_one = tl.maximum(first_step - before, 0), tl.minimum(stop_step - before, steps)
            if PLANNED:
                before += steps
            n_inner, n_edge = 0, 0
            if (first_one < stop_one) & (not sparse):
                n_inner, n_edge = list_column_tiles(
                    p_bits + i_bh * n_blocks * n_words, p_block, p_list, i_key_block, n_queries, n_blocks, n_words,
                    capacity, BM, LIST_CHUNK, FIELDS,
                )  # fmt: skip
            alpha, beta, z_scale, slope = head_scales(p_alpha, p_slopes, i_head, scale, BIAS)
            o_q = head_offset(i_batch, i_head, stride_qb, stride_qh)
            o_o = head_offset(i_batch, i_head, stride_ob, stride_oh)
            n_inner, n_edge = n_inner * PARTS, n_edge * PARTS
            dk, dv, broken = add_key_gradients(
                k, v, key, p_q + o_q, p_do + o_o, stride_qt, stride_ot, p_tau + i_bh * n_queries,
                p_delta + i_bh * n_queries, p_first, p_first + stride_rows, p_list, 1, first_one,
                tl.minimum(stop_one, n_inner), 0, 0, capacity, dk, dv, broken, z_scale, beta, slope, offset, n_queries,
                D, BD, BM, STEP, TRANSPOSED, BIAS, False, PRECISION, POWER, False, STAGES,
            )  # fmt: skip
            dk, dv, broken = add_key_gradients(
                k, v, key, p_q + o_q, p_do + o_o, stride_qt, stride_ot, p_tau + i_bh * n_queries,
                p_delta + i_bh * n_queries, p_first, p_first + stride_rows, p_list + capacity - 1, -1,
                tl.maximum(first_one - n_inner, 0), tl.minimum(stop_one - n_inner, n_edge), 0, 0, capacity, dk, dv,
                broken, z_scale, beta, slope, offset, n_queries, D, BD, BM, STEP, TRANSPOSED, BIAS, True, PRECISION,
                POWER, False, STAGES,
            )  # fmt: skip
            if KEYS:
                whole, count = 0, 0
                if (first_one < stop_one) & sparse:
                    p_head_rows = p_row_bits + i_bh * stride_row_bits
                    whole, count = list_column_queries(
                        row_words(p_head_rows, i_key_block // 32, n_queries, triangular), p_block, p_entries,
                        i_key_block, n_queries, n_blocks, key_capacity, BM, LIST_CHUNK, ROWS_AT_ONCE, FIELDS,
                    )  # fmt: skip
                n_inner, count = whole, whole + count
                whole = n_inner // STEP
                dk, dv, broken = add_key_gradients(
                    k, v, key, p_q + o_q, p_do + o_o, stride_qt, stride_ot, p_tau + i_bh * n_queries,
                    p_delta + i_bh * n_queries, p_first, p_first + stride_rows, p_entries, 1, first_one,
                    tl.minimum(stop_one, whole), n_inner, count, key_capacity, dk, dv, broken, z_scale, beta, slope,
                    offset, n_queries, D, BD, BM, STEP, TRANSPOSED, BIAS, False, PRECISION, POWER, True, STAGES,
                )  # fmt: skip
                dk, dv, broken = add_key_gradients(
                    k, v, key, p_q + o_q, p_do + o_o, stride_qt, stride_ot, p_tau + i_bh * n_queries,
                    p_delta + i_bh * n_queries, p_first, p_first + stride_rows, p_entries, 1,
                    tl.maximum(first_one, whole), tl.minimum(stop_one, tl.cdiv(count, STEP)), n_inner, count,
                    key_capacity, dk, dv, broken, z_scale, beta, slope, offset, n_queries, D, BD, BM, STEP, TRANSPOSED,
                    BIAS, True, PRECISION, POWER, True, STAGES,
                )  # fmt: skip
            tl.debug_barrier()  # the next head overwrites the list
        spoil = tl.where(tl.max(broken, 0) > 0, float("nan"), 0.0)
        dk, dv = dk * scale + spoil, dv + spoil
        if PLANNED:  # noqa: SIM102 (one of the compiler, one of the device)
            if task < n_parts:
                place = tl.arange(0, BM)[:, None] * BD + tl.arange(0, BD)[None, :]
                p = p_sums + task.to(tl.int64) * (2 * BM * BD) + place
                tl.store(p, dk)
                tl.store(p + BM * BD, dv)
        if (task >= n_parts) & (stop_step > 0):
            o_d = head_offset(i_batch, i_group, stride_db, stride_dh)
            o_e = head_offset(i_batch, i_group, stride_eb, stride_eh)
            store_rows(p_dk + o_d, dk, i_key_block * BM, stride_dt, n_keys, BM, D, BD)
            store_rows(p_dv + o_e, dv, i_key_block * BM, stride_et, n_keys, BM, D, BD)
        task = tl.atomic_add(p_counter, 1)
