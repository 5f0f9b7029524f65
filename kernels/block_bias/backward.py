"""The Triton passes backward: dq and dbias by tiles of queries, dk and dv by tiles of keys. Every number is written by
one program, which sums in order."""

import triton
import triton.language as tl

from kernels.block_bias.tiles import (
    LENGTHS,
    bias_of_keys,
    bias_rows,
    biased_scores,
    count_documents,
    head_slope,
    list_reading_tiles,
    load_queries,
    next_document,
)
from kernels.block_sparse.passes import list_given
from kernels.common.tiles import add_position_bias, head_offset, load_rows, store_rows


@triton.jit
def load_sums(p_lse, p_delta, i_bh, row, n_queries):
    """Log-sum-exps, 0 for rows that read nothing, and deltas of queries, each [BM]."""
    o_row = i_bh.to(tl.int64) * n_queries + row
    lse = tl.load(p_lse + o_row, mask=row < n_queries, other=float("-inf"))
    delta = tl.load(p_delta + o_row, mask=row < n_queries, other=0.0)
    return tl.where(lse == float("-inf"), 0.0, lse), delta


@triton.jit(do_not_specialize=LENGTHS)
def backward_live_queries(
    p_q, p_k, p_v, p_grad, p_bias, p_lse, p_delta, p_live, p_first, p_own, p_slopes, p_list, p_dq, p_dbias,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_bb, stride_bh, stride_bt, stride_ob, stride_oh, stride_ot, stride_row,
    scale, heads, repeat, n_queries, n_keys, n_blocks,
    SIZE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SLOPES: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Programs and lists as of `attend_live_blocks`. p_grad: (B, H, n, D), of the output. p_lse, p_delta: float32
    (B, H, n), log-sum-exps of base 2 and sums of grad * out. p_dbias: float32 (B, H, n, C), zeros."""
    n_tiles, i_bh = tl.num_programs(0), tl.program_id(1)
    i_tile = n_tiles - 1 - tl.program_id(0)
    i_batch, i_head = i_bh // heads, i_bh % heads
    i_group = i_head // repeat
    row, first, own = load_queries(p_first, p_own, i_batch, i_tile, stride_row, n_queries, n_keys, BM)
    p_rows = bias_rows(p_bias, i_batch, i_head, row, stride_bb, stride_bh, stride_bt)
    p_shares = p_dbias + (i_bh.to(tl.int64) * n_queries + row) * n_blocks
    o_program = (i_bh.to(tl.int64) * n_tiles + i_tile) * n_blocks
    p_live, p_list = p_live + o_program, p_list + o_program
    p_q += head_offset(i_batch, i_head, stride_qb, stride_qh)
    p_grad += head_offset(i_batch, i_head, stride_gb, stride_gh)
    q = load_rows(p_q, i_tile * BM, stride_qt, n_queries, BM, D, BD, True)
    grad = load_rows(p_grad, i_tile * BM, stride_gt, n_queries, BM, D, BD, True)
    lse, delta = load_sums(p_lse, p_delta, i_bh, row, n_queries)
    keys = p_k + head_offset(i_batch, i_group, stride_kb, stride_kh)
    values = p_v + head_offset(i_batch, i_group, stride_vb, stride_vh)
    slope = head_slope(p_slopes, i_head, scale, SLOPES)

    CHUNKS: tl.constexpr = (SIZE + BN - 1) // BN
    exp2_scale = scale * 1.4426950408889634
    dq = tl.zeros([BM, BD], tl.float32)
    share = tl.zeros([BM], tl.float32)
    start = -1
    for _ in tl.range(0, count_documents(first), num_stages=1):
        start, last, end = next_document(first, own, start)
        seen = tl.minimum((end - start + SIZE - 1) // SIZE, n_blocks)
        count = list_given(p_list, p_live, 0, seen, 0, CHUNK)
        tl.debug_barrier()  # the whole program reads the list next
        for n in tl.range(0, count * CHUNKS, num_stages=STAGES):
            block = tl.load(p_list + n // CHUNKS)
            bias = tl.load(p_rows + block, mask=last >= 0, other=float("-inf")) / scale
            block_end = tl.minimum(start + (block + 1) * SIZE, end)
            key_start = start + block * SIZE + n % CHUNKS * BN
            k = load_rows(keys, key_start, stride_kt, block_end, BN, D, BD, True)
            v = load_rows(values, key_start, stride_vt, block_end, BN, D, BD, True)
            key = key_start + tl.arange(0, BN)
            x = biased_scores(
                q, k, bias, key, start, own, tl.minimum(last, block_end - 1), slope, SLOPES, PRECISION
            )  # fmt: skip
            p = tl.exp2(x * exp2_scale - lse[:, None])
            dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            ds = p * (dp - delta[:, None])
            share = tl.where(n % CHUNKS == 0, 0.0, share) + tl.sum(ds, 1)
            tl.store(p_shares + block, share, mask=last >= 0)  # the last of a block's tiles is what stays
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        tl.debug_barrier()  # before the next document's list
    p_dq += head_offset(i_batch, i_head, stride_ob, stride_oh)
    store_rows(p_dq, dq * scale, i_tile * BM, stride_ot, n_queries, BM, D, BD)


@triton.jit(do_not_specialize=LENGTHS)
def backward_live_keys(
    p_q, p_k, p_v, p_grad, p_bias, p_lse, p_delta, p_live, p_bounds, p_first, p_own, p_slopes, p_list, p_dk, p_dv,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_bb, stride_bh, stride_bt, stride_db, stride_dh, stride_dt,
    stride_eb, stride_eh, stride_et, stride_row,
    scale, heads, repeat, n_queries, n_keys, n_tiles, n_blocks,
    SIZE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SLOPES: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr, BOUNDS: tl.constexpr,
):  # fmt: skip
    """One program a tile of BN keys and key head, wherever documents begin: a loop over the tiles of queries, of each
    query head of the group, that read any of its keys, which lie in up to COLUMNS blocks of a query.

    p_live, p_bounds: as `mark_live_blocks` leaves them. p_list: int32 (B * G, key tiles, H / G * n_tiles)."""
    i_tile, i_bg = tl.program_id(0), tl.program_id(1)
    groups = heads // repeat
    i_batch, i_group = i_bg // groups, i_bg % groups
    key_start = i_tile * BN
    p_list += (i_bg.to(tl.int64) * tl.num_programs(0) + i_tile) * repeat * n_tiles
    p_bounds += i_batch * n_tiles * BOUNDS
    count = 0
    for member in range(0, repeat):
        i_bh = (i_batch * heads + i_group * repeat + member).to(tl.int64)
        count = list_reading_tiles(
            p_list, count, member * n_tiles, p_live + i_bh * n_tiles * n_blocks, p_bounds, key_start, n_tiles, n_blocks,
            SIZE, BN, COLUMNS, BOUNDS, CHUNK,
        )  # fmt: skip
    tl.debug_barrier()  # the whole program reads the list next

    k = load_rows(
        p_k + head_offset(i_batch, i_group, stride_kb, stride_kh), key_start, stride_kt, n_keys, BN, D, BD, True
    )  # fmt: skip
    v = load_rows(
        p_v + head_offset(i_batch, i_group, stride_vb, stride_vh), key_start, stride_vt, n_keys, BN, D, BD, True
    )  # fmt: skip
    key = key_start + tl.arange(0, BN)
    exp2_scale = scale * 1.4426950408889634
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    for n in tl.range(0, count, num_stages=STAGES):
        entry = tl.load(p_list + n)
        i_head, i_rows = i_group * repeat + entry // n_tiles, entry % n_tiles
        row, first, own = load_queries(p_first, p_own, i_batch, i_rows, stride_row, n_queries, n_keys, BM)
        q = load_rows(
            p_q + head_offset(i_batch, i_head, stride_qb, stride_qh), i_rows * BM, stride_qt, n_queries, BM, D, BD, True
        )  # fmt: skip
        grad = load_rows(
            p_grad + head_offset(i_batch, i_head, stride_gb, stride_gh), i_rows * BM, stride_gt, n_queries, BM, D, BD,
            True,
        )  # fmt: skip
        lse, delta = load_sums(p_lse, p_delta, i_batch * heads + i_head, row, n_queries)
        p_rows = bias_rows(p_bias, i_batch, i_head, row, stride_bb, stride_bh, stride_bt)
        bias = bias_of_keys(p_rows, key, key_start, first, own, n_blocks, SIZE, COLUMNS)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if SLOPES:
            slope = head_slope(p_slopes, i_head, scale, SLOPES)
            x = add_position_bias(x, own[:, None], key[None, :], key_start, slope)
        read = bias != float("-inf")
        x = tl.where(read, x + bias / scale, float("-inf"))
        p = tl.exp2(x * exp2_scale - lse[:, None])
        dv = tl.dot(tl.trans(p.to(grad.dtype)), grad, dv, input_precision=PRECISION)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        ds = tl.where(read, p * (dp - delta[:, None]), 0.0).to(q.dtype)  # a NaN of other keys stays theirs
        dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
    p_dk += head_offset(i_batch, i_group, stride_db, stride_dh)
    p_dv += head_offset(i_batch, i_group, stride_eb, stride_eh)
    store_rows(p_dk, dk * scale, key_start, stride_dt, n_keys, BN, D, BD)
    store_rows(p_dv, dv, key_start, stride_et, n_keys, BN, D, BD)
