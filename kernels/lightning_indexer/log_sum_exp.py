"""What softmax is divided by: log-sum-exps of base 2 over the keys that a row sees, of attention and of the indexer."""

import triton
import triton.language as tl

from kernels.common.tiles import head_offset, load_rows
from kernels.lightning_indexer.tiles import (
    LENGTHS,
    attention_scores,
    index_scores,
    key_range,
    load_intervals,
    seen_keys,
)


@triton.jit
def add_powers(x, total, top, exp2_scale):
    """x: raw scores [rows, keys], -inf where not seen. total: sum of their powers so far; top: their maximum so far."""
    new_top = tl.maximum(top, tl.max(x, 1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top * exp2_scale)  # rows that have seen no score yet
    total = total * tl.exp2(top * exp2_scale - shift) + tl.sum(tl.exp2(x * exp2_scale - shift[:, None]), 1)
    return total, new_top


@triton.jit
def log_sum(total, top, exp2_scale):
    """0 for rows that see no key: whatever it is, nothing of theirs is counted. NaN where any score that is seen is."""
    none = total == 0
    return tl.where(none, 0.0, top * exp2_scale + tl.log2(tl.where(none, 1.0, total)))


@triton.jit(do_not_specialize=LENGTHS)
def attention_log_sum_exp(
    p_q, p_k, p_first, p_own, p_bits, p_slopes, p_lse,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_rows, stride_bits,
    scale, n_queries, n_keys,
    HEADS: tl.constexpr, REPEAT: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BIAS: tl.constexpr, CHOSEN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program a tile of BM queries and query head. p_lse: float32 (B, H, n)."""
    i_block, i_bh = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # long ones first
    i_batch, i_head = i_bh // HEADS, i_bh % HEADS
    start = i_block * BM
    row = start + tl.arange(0, BM)
    inside = row < n_queries
    o_rows = i_batch.to(tl.int64) * stride_rows
    first, end = load_intervals(p_first + o_rows, p_own + o_rows, row, inside)
    lo, hi = key_range(first, end, BN)
    p_q += head_offset(i_batch, i_head, stride_qb, stride_qh)
    q = load_rows(p_q, start, stride_qt, n_queries, BM, D, BD, True)
    p_k += head_offset(i_batch, i_head // REPEAT, stride_kb, stride_kh)
    if CHOSEN:
        p_bits += i_batch.to(tl.int64) * n_queries * stride_bits
    slope = 0.0
    if BIAS:
        slope = tl.load(p_slopes + i_head) / scale
    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    exp2_scale = scale * 1.4426950408889634
    for start_key in tl.range(lo, hi, BN, num_stages=STAGES):
        key = start_key + tl.arange(0, BN)
        k = load_rows(p_k, start_key, stride_kt, n_keys, BN, D, BD, True)
        x = attention_scores(q, k, key, end, start_key, slope, BIAS, PRECISION)
        seen = seen_keys(p_bits, start, start_key, first, end, stride_bits, n_queries, CHOSEN, BM, BN)
        total, top = add_powers(tl.where(seen, x, float("-inf")), total, top, exp2_scale)
    tl.store(p_lse + i_bh.to(tl.int64) * n_queries + row, log_sum(total, top, exp2_scale), mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def index_log_sum_exp(
    p_index_q, p_index_k, p_weights, p_first, p_own, p_bits, p_index_lse,
    stride_ib, stride_ih, stride_it, stride_jb, stride_jt, stride_wb, stride_wh, stride_wt, stride_rows, stride_bits,
    n_queries, n_keys,
    INDEX_HEADS: tl.constexpr, ID: tl.constexpr, BID: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CHOSEN: tl.constexpr, INDEX_PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program a tile of BM queries. p_index_lse: float32 (B, n)."""
    i_block, i_batch = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    start = i_block * BM
    row = start + tl.arange(0, BM)
    inside = row < n_queries
    o_rows = i_batch * stride_rows
    first, end = load_intervals(p_first + o_rows, p_own + o_rows, row, inside)
    lo, hi = key_range(first, end, BN)
    if CHOSEN:
        p_bits += i_batch * n_queries * stride_bits
    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    for start_key in tl.range(lo, hi, BN, num_stages=1):
        k = load_rows(p_index_k + i_batch * stride_jb, start_key, stride_jt, n_keys, BN, ID, BID, True)
        x = index_scores(
            p_index_q + i_batch * stride_ib, p_weights + i_batch * stride_wb, k, start, row, inside,
            stride_ih, stride_it, stride_wh, stride_wt, n_queries,
            INDEX_HEADS, ID, BID, BM, BN, INDEX_PRECISION, STAGES,
        )  # fmt: skip
        seen = seen_keys(p_bits, start, start_key, first, end, stride_bits, n_queries, CHOSEN, BM, BN)
        total, top = add_powers(tl.where(seen, x, float("-inf")), total, top, 1.4426950408889634)
    lse = log_sum(total, top, 1.4426950408889634)
    tl.store(p_index_lse + i_batch * n_queries + row, lse, mask=inside)
