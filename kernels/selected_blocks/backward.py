"""The Triton passes backward, a block of keys at a time; sums in order, nothing is added atomically."""

import triton
import triton.language as tl

from kernels.common.tiles import head_offset
from kernels.selected_blocks.tiles import LENGTHS, block_keys, gather_rows, listed_rows, row_slopes, seen_scores


@triton.jit(do_not_specialize=LENGTHS)
def row_products(
    p_a, p_b, p_sums,
    stride_ab, stride_ah, stride_at, stride_bb, stride_bh, stride_bt,
    n_rows, n_queries, heads,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """float32 (B, H, n): a . b over the head dim. a, b: (B, H, n, D)."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = row < n_rows
    query, i_bh = row % n_queries, row // n_queries
    i_batch, head = (i_bh // heads).to(tl.int64), i_bh % heads
    a = gather_rows(p_a + (i_batch * stride_ab)[:, None], head, query, stride_ah, stride_at, inside, D, BD)
    b = gather_rows(p_b + (i_batch * stride_bb)[:, None], head, query, stride_bh, stride_bt, inside, D, BD)
    tl.store(p_sums + row, tl.sum(a.to(tl.float32) * b.to(tl.float32), 1), mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def backward_by_key(
    p_q, p_k, p_v, p_grad, p_lse, p_delta, p_order, p_parts, p_own, p_slopes, p_part_dq, p_part_dk, p_part_dv,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_own, stride_sb, stride_sh, stride_st,
    scale, n_queries, n_keys, groups, count,
    SIZE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, REPEAT: tl.constexpr, BM: tl.constexpr,
    FIELDS: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Programs and rows as of `attend_by_key`. Leaves each row's share of dq (without the scale), and the part's share
    of dk and dv.

    p_grad: (B, H, n, D), of the output. p_lse, p_delta: float32 (B, H, n) with one set of strides, log-sum-exps of base
    2 and sums of grad * out. p_part_dq: float32 (B, G, n, count, chunks, REPEAT, D). p_part_dk, p_part_dv: float32
    (parts, chunks * BN, D)."""
    i_part, chunk = tl.program_id(0), tl.program_id(1)
    p_part = p_parts + i_part * FIELDS
    i_bg, first, begin, end = tl.load(p_part), tl.load(p_part + 1), tl.load(p_part + 2), tl.load(p_part + 3)
    if begin < end:
        i_batch, i_group = i_bg // groups, i_bg % groups
        key, there = block_keys(first, chunk, n_keys, SIZE, BN)
        none = tl.zeros([BN], tl.int32)
        k = gather_rows(
            p_k + head_offset(i_batch, i_group, stride_kb, stride_kh), none, key, 0, stride_kt, there, D, BD
        )  # fmt: skip
        v = gather_rows(
            p_v + head_offset(i_batch, i_group, stride_vb, stride_vh), none, key, 0, stride_vt, there, D, BD
        )  # fmt: skip
        p_q += i_batch.to(tl.int64) * stride_qb
        p_grad += i_batch.to(tl.int64) * stride_gb
        CHUNKS: tl.constexpr = (SIZE + BN - 1) // BN
        dim = tl.arange(0, BD)
        exp2_scale = scale * 1.4426950408889634
        dk = tl.zeros([BN, BD], tl.float32)
        dv = tl.zeros([BN, BD], tl.float32)
        for tile in tl.range(0, ((end - begin) * REPEAT + BM - 1) // BM, num_stages=STAGES):
            inside, pair, query, member = listed_rows(p_order, tile, begin, end, n_queries, count, REPEAT, BM)
            head = i_group * REPEAT + member
            q = gather_rows(p_q, head, query, stride_qh, stride_qt, inside, D, BD)
            grad = gather_rows(p_grad, head, query, stride_gh, stride_gt, inside, D, BD)
            own = tl.load(p_own + i_batch * stride_own + query, mask=inside, other=0)
            slope = row_slopes(p_slopes, head, inside, scale, BIAS)
            o_sum = head_offset(i_batch, head, stride_sb, stride_sh) + query * stride_st
            lse = tl.load(p_lse + o_sum, mask=inside, other=0.0)
            lse = tl.where(lse == float("-inf"), 0.0, lse)  # rows that read nothing
            delta = tl.load(p_delta + o_sum, mask=inside, other=0.0)
            x = seen_scores(q, k, key, there, first, own, slope, inside, BIAS, PRECISION)
            p = tl.exp2(x * exp2_scale - lse[:, None])
            dv = tl.dot(tl.trans(p.to(grad.dtype)), grad, dv, input_precision=PRECISION)
            dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            ds = (p * (dp - delta[:, None])).to(q.dtype)
            dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
            dq = tl.dot(ds, k, input_precision=PRECISION)
            o_row = (pair.to(tl.int64) * CHUNKS + chunk) * REPEAT + member
            p_rows = p_part_dq + o_row[:, None] * D + dim[None, :]
            tl.store(p_rows, dq, mask=inside[:, None] & (dim < D)[None, :])
        row = (i_part.to(tl.int64) * CHUNKS + chunk) * BN + tl.arange(0, BN)
        o_key = row[:, None] * D + dim[None, :]
        mask = (tl.arange(0, BN) >= 0)[:, None] & (dim < D)[None, :]
        tl.store(p_part_dk + o_key, dk * scale, mask=mask)
        tl.store(p_part_dv + o_key, dv, mask=mask)


@triton.jit(do_not_specialize=LENGTHS)
def sum_parts(
    p_part_dk, p_part_dv, p_parts, p_starts, p_dk, p_dv,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    n_keys, groups,
    SIZE: tl.constexpr, SPAN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    FIELDS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """One program a tile of BN keys and group: adds the shares of the parts whose blocks hold them, in order, to what
    stands in dk and dv (if ADD), or to 0.

    Parts are listed by first key, so that those of a tile stand behind each other. p_starts: int32
    (B * G * n_keys + 1,), parts of blocks that begin before each key. SPAN: rows of a part."""
    i_tile, i_bg = tl.program_id(0), tl.program_id(1)
    i_batch, i_group = i_bg // groups, i_bg % groups
    key = i_tile * BN + tl.arange(0, BN)
    dim = tl.arange(0, BD)
    mask = (key < n_keys)[:, None] & (dim < D)[None, :]
    p_starts += i_bg.to(tl.int64) * n_keys
    lo = tl.load(p_starts + tl.maximum(i_tile * BN - SIZE + 1, 0))
    hi = tl.load(p_starts + tl.minimum(i_tile * BN + BN, n_keys))
    p_rows_k = p_dk + head_offset(i_batch, i_group, stride_kb, stride_kh) + key.to(tl.int64)[:, None] * stride_kt
    p_rows_v = p_dv + head_offset(i_batch, i_group, stride_vb, stride_vh) + key.to(tl.int64)[:, None] * stride_vt
    p_rows_k, p_rows_v = p_rows_k + dim[None, :], p_rows_v + dim[None, :]
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    if ADD:
        dk = tl.load(p_rows_k, mask=mask, other=0.0).to(tl.float32)
        dv = tl.load(p_rows_v, mask=mask, other=0.0).to(tl.float32)
    for part in range(lo, hi):
        row = key - tl.load(p_parts + part * FIELDS + 1)
        held = mask & ((row >= 0) & (row < SIZE))[:, None]
        o_row = (tl.cast(part, tl.int64) * SPAN + row)[:, None] * D + dim[None, :]
        dk += tl.load(p_part_dk + o_row, mask=held, other=0.0)
        dv += tl.load(p_part_dv + o_row, mask=held, other=0.0)
    tl.store(p_rows_k, dk.to(p_dk.dtype.element_ty), mask=mask)
    tl.store(p_rows_v, dv.to(p_dv.dtype.element_ty), mask=mask)
