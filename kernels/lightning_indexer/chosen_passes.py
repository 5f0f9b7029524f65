"""Attention over the keys that queries have chosen by bits, FlashAttention-2's passes (arXiv:2307.08691): forward, and
backward over queries and over keys. Nothing is added atomically. Log-sum-exps are of base 2."""

import triton
import triton.language as tl

from kernels.block_sparse.passes import add_block
from kernels.common.tiles import head_offset, load_rows, store_rows
from kernels.lightning_indexer.log_sum_exp import log_sum
from kernels.lightning_indexer.tiles import (
    LENGTHS,
    attention_scores,
    count_below,
    key_range,
    load_intervals,
    seen_keys,
)


@triton.jit(do_not_specialize=LENGTHS)
def keep_finite(
    p_k, p_v, p_k_out, p_v_out, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, groups, n_keys,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, NAN: tl.constexpr,
):  # fmt: skip
    """One program a tile of BN keys and key head: copies, contiguous, of k and v, where a key with anything that is not
    finite in either has the value 0, and as key NaN (if NAN) or 0. Products with weights of 0 let it pass else, where a
    score that is not seen is left out."""
    i_tile, i_bg = tl.program_id(0), tl.program_id(1)
    i_batch, i_group = i_bg // groups, i_bg % groups
    k = load_rows(
        p_k + head_offset(i_batch, i_group, stride_kb, stride_kh), i_tile * BN, stride_kt, n_keys, BN, D, BD, True
    )  # fmt: skip
    v = load_rows(
        p_v + head_offset(i_batch, i_group, stride_vb, stride_vh), i_tile * BN, stride_vt, n_keys, BN, D, BD, True
    )  # fmt: skip
    infinity = float("inf")
    finite = (tl.abs(k.to(tl.float32)) < infinity) & (tl.abs(v.to(tl.float32)) < infinity)
    finite = (tl.min(finite.to(tl.int32), 1) != 0)[:, None]
    o_head = i_bg.to(tl.int64) * n_keys * D
    store_rows(p_k_out + o_head, tl.where(finite, k, float("nan") if NAN else 0.0), i_tile * BN, D, n_keys, BN, D, BD)
    store_rows(p_v_out + o_head, tl.where(finite, v, 0.0), i_tile * BN, D, n_keys, BN, D, BD)


@triton.jit(do_not_specialize=LENGTHS)
def attend_chosen(
    p_q, p_k, p_v, p_first, p_own, p_bits, p_slopes, p_out, p_lse,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, stride_rows, stride_bits, scale, n_queries, n_keys,
    HEADS: tl.constexpr, REPEAT: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BIAS: tl.constexpr, CHOSEN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program a tile of BM queries and query head. p_lse: float32 (B, H, n), 0 where a row sees nothing."""
    i_block, i_bh = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # long ones first
    i_batch, i_head = i_bh // HEADS, i_bh % HEADS
    start = i_block * BM
    row = start + tl.arange(0, BM)
    inside = row < n_queries
    o_rows = i_batch.to(tl.int64) * stride_rows
    first, end = load_intervals(p_first + o_rows, p_own + o_rows, row, inside)
    lo, hi = key_range(first, end, BN)
    p_bits += i_batch.to(tl.int64) * n_queries * stride_bits
    p_q += head_offset(i_batch, i_head, stride_qb, stride_qh)
    p_k += head_offset(i_batch, i_head // REPEAT, stride_kb, stride_kh)
    p_v += head_offset(i_batch, i_head // REPEAT, stride_vb, stride_vh)
    q = load_rows(p_q, start, stride_qt, n_queries, BM, D, BD, True)
    slope = 0.0
    if BIAS:
        slope = tl.load(p_slopes + i_head) / scale
    out = tl.zeros([BM, BD], tl.float32)
    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    exp2_scale = scale * 1.4426950408889634
    for start_key in tl.range(lo, hi, BN, num_stages=STAGES):
        key = start_key + tl.arange(0, BN)
        k = load_rows(p_k, start_key, stride_kt, n_keys, BN, D, BD, True)
        v = load_rows(p_v, start_key, stride_vt, n_keys, BN, D, BD, True)
        x = attention_scores(q, k, key, end, start_key, slope, BIAS, PRECISION)
        seen = seen_keys(p_bits, start, start_key, first, end, stride_bits, n_queries, CHOSEN, BM, BN)
        out, total, top = add_block(
            tl.where(seen, x, float("-inf")), v, out, total, top, exp2_scale, PRECISION
        )  # fmt: skip
    empty = (total == 0) & (first < end)
    if tl.max(empty.to(tl.int32), 0) != 0:  # rows that chose nothing are 0; if all scores are -inf, NaN, as in softmax
        some = tl.zeros([BM], tl.int32)
        for start_key in tl.range(lo, hi, BN, num_stages=1):
            seen = seen_keys(p_bits, start, start_key, first, end, stride_bits, n_queries, CHOSEN, BM, BN)
            some = tl.maximum(some, tl.max(seen.to(tl.int32), 1))
        total = tl.where(empty & (some != 0), float("nan"), total)
    out = out / tl.where(total == 0, 1.0, total)[:, None]  # rows that see nothing are 0
    store_rows(p_out + head_offset(i_batch, i_head, stride_ob, stride_oh), out, start, stride_ot, n_queries, BM, D, BD)
    tl.store(p_lse + i_bh.to(tl.int64) * n_queries + row, log_sum(total, top, exp2_scale), mask=inside)


@triton.jit
def weights_and_gradients(
    q, k, v, grad, lse, delta, key, end, seen, start_key, slope, scale, BIAS: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """p and ds = p (dP - delta) of a tile, [rows, keys], 0 where not seen, whatever a row's numbers are. lse, delta:
    [rows]."""
    x = attention_scores(q, k, key, end, start_key, slope, BIAS, PRECISION)
    p = tl.exp2(tl.where(seen, x * (scale * 1.4426950408889634) - lse[:, None], float("-inf")))
    ds = p * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    return p, tl.where(seen, ds, 0.0)


@triton.jit(do_not_specialize=LENGTHS)
def chosen_backward_queries(
    p_q, p_k, p_v, p_grad, p_lse, p_delta, p_first, p_own, p_bits, p_slopes, p_dq,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_ob, stride_oh, stride_ot, stride_rows, stride_bits,
    scale, n_queries, n_keys,
    HEADS: tl.constexpr, REPEAT: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BIAS: tl.constexpr, CHOSEN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Programs as of `attend_chosen`. p_delta: float32 (B, H, n), sums of grad * out. Strides o are of p_dq."""
    i_block, i_bh = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    i_batch, i_head = i_bh // HEADS, i_bh % HEADS
    start = i_block * BM
    row = start + tl.arange(0, BM)
    inside = row < n_queries
    o_rows = i_batch.to(tl.int64) * stride_rows
    first, end = load_intervals(p_first + o_rows, p_own + o_rows, row, inside)
    lo, hi = key_range(first, end, BN)
    p_bits += i_batch.to(tl.int64) * n_queries * stride_bits
    p_k += head_offset(i_batch, i_head // REPEAT, stride_kb, stride_kh)
    p_v += head_offset(i_batch, i_head // REPEAT, stride_vb, stride_vh)
    q = load_rows(
        p_q + head_offset(i_batch, i_head, stride_qb, stride_qh), start, stride_qt, n_queries, BM, D, BD, True
    )  # fmt: skip
    grad = load_rows(
        p_grad + head_offset(i_batch, i_head, stride_gb, stride_gh), start, stride_gt, n_queries, BM, D, BD, True
    )  # fmt: skip
    o_sum = i_bh.to(tl.int64) * n_queries + row
    lse = tl.load(p_lse + o_sum, mask=inside, other=0.0)
    delta = tl.load(p_delta + o_sum, mask=inside, other=0.0)
    slope = 0.0
    if BIAS:
        slope = tl.load(p_slopes + i_head) / scale
    dq = tl.zeros([BM, BD], tl.float32)
    for start_key in tl.range(lo, hi, BN, num_stages=STAGES):
        key = start_key + tl.arange(0, BN)
        k = load_rows(p_k, start_key, stride_kt, n_keys, BN, D, BD, True)
        v = load_rows(p_v, start_key, stride_vt, n_keys, BN, D, BD, True)
        seen = seen_keys(p_bits, start, start_key, first, end, stride_bits, n_queries, CHOSEN, BM, BN)
        _, ds = weights_and_gradients(
            q, k, v, grad, lse, delta, key, end, seen, start_key, slope, scale, BIAS, PRECISION
        )  # fmt: skip
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    p_dq += head_offset(i_batch, i_head, stride_ob, stride_oh)
    store_rows(p_dq, dq * scale, start, stride_ot, n_queries, BM, D, BD)


@triton.jit(do_not_specialize=LENGTHS)
def chosen_backward_keys(
    p_q, p_k, p_v, p_grad, p_lse, p_delta, p_first, p_own, p_bits, p_slopes, p_dk, p_dv,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_rows, stride_bits, scale, n_queries, n_keys, search_steps,
    HEADS: tl.constexpr, REPEAT: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BIAS: tl.constexpr, CHOSEN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program a tile of BN keys and key head, over the queries as `gradient_by_key` goes. p_dk, p_dv: (B, G, keys,
    D), contiguous."""
    i_tile, i_bg = tl.program_id(0), tl.program_id(1)
    GROUPS: tl.constexpr = HEADS // REPEAT
    i_batch, i_group = i_bg // GROUPS, i_bg % GROUPS
    start_key = i_tile * BN
    key = start_key + tl.arange(0, BN)
    o_rows = i_batch.to(tl.int64) * stride_rows
    p_first += o_rows
    p_own += o_rows
    lo = count_below(p_own, start_key, n_queries, search_steps) // BM * BM
    hi = count_below(p_first, start_key + BN, n_queries, search_steps)
    p_bits += i_batch.to(tl.int64) * n_queries * stride_bits
    k = load_rows(
        p_k + head_offset(i_batch, i_group, stride_kb, stride_kh), start_key, stride_kt, n_keys, BN, D, BD, True
    )  # fmt: skip
    v = load_rows(
        p_v + head_offset(i_batch, i_group, stride_vb, stride_vh), start_key, stride_vt, n_keys, BN, D, BD, True
    )  # fmt: skip
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    for start in tl.range(lo, hi, BM, num_stages=1):
        row = start + tl.arange(0, BM)
        inside = row < n_queries
        first, end = load_intervals(p_first, p_own, row, inside)
        seen = seen_keys(p_bits, start, start_key, first, end, stride_bits, n_queries, CHOSEN, BM, BN)
        for member in tl.range(0, REPEAT, num_stages=STAGES):
            i_head = i_group * REPEAT + member
            q = load_rows(
                p_q + head_offset(i_batch, i_head, stride_qb, stride_qh), start, stride_qt, n_queries, BM, D, BD, True
            )  # fmt: skip
            p_head = p_grad + head_offset(i_batch, i_head, stride_gb, stride_gh)
            grad = load_rows(p_head, start, stride_gt, n_queries, BM, D, BD, True)
            o_sum = (i_batch.to(tl.int64) * HEADS + i_head) * n_queries + row
            lse = tl.load(p_lse + o_sum, mask=inside, other=0.0)
            delta = tl.load(p_delta + o_sum, mask=inside, other=0.0)
            slope = 0.0
            if BIAS:
                slope = tl.load(p_slopes + i_head) / scale
            p, ds = weights_and_gradients(
                q, k, v, grad, lse, delta, key, end, seen, start_key, slope, scale, BIAS, PRECISION
            )  # fmt: skip
            dv = tl.dot(tl.trans(p.to(grad.dtype)), grad, dv, input_precision=PRECISION)
            dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=PRECISION)
    o_head = i_bg.to(tl.int64) * n_keys * D
    store_rows(p_dk + o_head, dk * scale, start_key, D, n_keys, BN, D, BD)
    store_rows(p_dv + o_head, dv, start_key, D, n_keys, BN, D, BD)
