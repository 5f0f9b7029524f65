"""The loss and its gradients: a pass over queries and one over keys, which compute weights and scores again, a tile at
a time. Each adds in order what its own tile is owed; nothing is added atomically."""

import triton
import triton.language as tl

from kernels.common.tiles import load_rows
from kernels.lightning_indexer.tiles import LENGTHS, compared, count_below, key_range, load_intervals, seen_keys


@triton.jit(do_not_specialize=LENGTHS)
def loss_by_query(
    p_index_q, p_index_k, p_weights, p_index_lse, p_q, p_k, p_lse, p_first, p_own, p_bits, p_slopes,
    p_loss, p_dq, p_dw,
    stride_ib, stride_ih, stride_it, stride_jb, stride_jt, stride_wb, stride_wh, stride_wt,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_rows, stride_bits,
    scale, n_queries, n_keys,
    INDEX_HEADS: tl.constexpr, ID: tl.constexpr, BID: tl.constexpr, HEADS: tl.constexpr, REPEAT: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BIAS: tl.constexpr, CHOSEN: tl.constexpr, INDEX_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program a tile of BM queries.

    p_loss: float32 (B, n), KL(p || softmax(I)) in nats. p_dq: float32 (B, index heads, n, ID), zeros before, to which
    each tile of keys adds. p_dw: float32 (B, index heads, n). BH: at least the index heads."""
    i_block, i_batch = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)  # long ones first
    start = i_block * BM
    row = start + tl.arange(0, BM)
    inside = row < n_queries
    o_rows = i_batch * stride_rows
    first, end = load_intervals(p_first + o_rows, p_own + o_rows, row, inside)
    lo, hi = key_range(first, end, BN)
    if CHOSEN:
        p_bits += i_batch * n_queries * stride_bits
    p_index_q += i_batch * stride_ib
    p_index_k += i_batch * stride_jb
    p_weights += i_batch * stride_wb
    head, dim = tl.arange(0, BH), tl.arange(0, BID)
    loss = tl.zeros([BM], tl.float32)
    dw = tl.zeros([BH, BM], tl.float32)
    for start_key in tl.range(lo, hi, BN, num_stages=1):
        key = start_key + tl.arange(0, BN)
        k = load_rows(p_index_k, start_key, stride_jt, n_keys, BN, ID, BID, True)
        seen = seen_keys(p_bits, start, start_key, first, end, stride_bits, n_queries, CHOSEN, BM, BN)
        p, log_q, ds = compared(
            p_index_q, p_weights, k, p_index_lse + i_batch * n_queries,
            p_q + i_batch * stride_qb, p_k + i_batch * stride_kb, p_lse + i_batch * HEADS * n_queries, p_slopes,
            start, start_key, row, inside, key, end, seen,
            stride_ih, stride_it, stride_wh, stride_wt, stride_qh, stride_qt, stride_kh, stride_kt,
            scale, n_queries, n_keys,
            INDEX_HEADS, ID, BID, HEADS, REPEAT, D, BD, BM, BN, BIAS, INDEX_PRECISION, PRECISION, STAGES,
        )  # fmt: skip
        none = p == 0  # not where p is NaN, which is to be seen
        loss += tl.sum(tl.where(none, 0.0, p * (tl.log2(tl.where(none, 1.0, p)) - log_q)), 1)
        # not pipelined: what a tile of keys adds has to be there when the next one reads it
        for j in tl.range(0, INDEX_HEADS, num_stages=1):
            q = load_rows(p_index_q + tl.cast(j, tl.int64) * stride_ih, start, stride_it, n_queries, BM, ID, BID, True)
            p_w = p_weights + tl.cast(j, tl.int64) * stride_wh + row * stride_wt
            w = tl.load(p_w, mask=inside, other=0.0).to(tl.float32)
            x = tl.dot(q, tl.trans(k), input_precision=INDEX_PRECISION)
            share = tl.sum(tl.where(x > 0, x * ds, 0.0), 1)
            dw += tl.where((head == j)[:, None], share[None, :], 0.0)
            dx = tl.where(x > 0, ds * w[:, None], 0.0).to(k.dtype)
            o_dq = ((i_batch * INDEX_HEADS + j) * n_queries + row)[:, None] * ID + dim[None, :]
            m_dq = inside[:, None] & (dim < ID)[None, :]
            dq = tl.load(p_dq + o_dq, mask=m_dq, other=0.0)
            dq += tl.dot(dx, k, input_precision=INDEX_PRECISION)
            tl.store(p_dq + o_dq, dq, mask=m_dq)
        tl.debug_barrier()
    tl.store(p_loss + i_batch * n_queries + row, loss * 0.6931471805599453, mask=inside)
    o_dw = (i_batch * INDEX_HEADS + head)[:, None] * n_queries + row[None, :]
    tl.store(p_dw + o_dw, dw, mask=(head < INDEX_HEADS)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def gradient_by_key(
    p_index_q, p_index_k, p_weights, p_index_lse, p_q, p_k, p_lse, p_first, p_own, p_bits, p_slopes, p_dk,
    stride_ib, stride_ih, stride_it, stride_jb, stride_jt, stride_wb, stride_wh, stride_wt,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_rows, stride_bits,
    scale, n_queries, n_keys, search_steps,
    INDEX_HEADS: tl.constexpr, ID: tl.constexpr, BID: tl.constexpr, HEADS: tl.constexpr, REPEAT: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BIAS: tl.constexpr, CHOSEN: tl.constexpr, INDEX_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program a tile of BN keys: over the queries from the first one that stands at the tile or behind it to the
    last one whose document begins in it or before it. p_dk: float32 (B, keys, ID)."""
    i_tile, i_batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start_key = i_tile * BN
    key = start_key + tl.arange(0, BN)
    p_first += i_batch * stride_rows
    p_own += i_batch * stride_rows
    if CHOSEN:
        p_bits += i_batch * n_queries * stride_bits
    lo = count_below(p_own, start_key, n_queries, search_steps) // BM * BM
    hi = count_below(p_first, start_key + BN, n_queries, search_steps)
    p_index_q += i_batch * stride_ib
    p_weights += i_batch * stride_wb
    k = load_rows(p_index_k + i_batch * stride_jb, start_key, stride_jt, n_keys, BN, ID, BID, True)
    dk = tl.zeros([BN, BID], tl.float32)
    for start in tl.range(lo, hi, BM, num_stages=1):
        row = start + tl.arange(0, BM)
        inside = row < n_queries
        first, end = load_intervals(p_first, p_own, row, inside)
        seen = seen_keys(p_bits, start, start_key, first, end, stride_bits, n_queries, CHOSEN, BM, BN)
        _, _, ds = compared(
            p_index_q, p_weights, k, p_index_lse + i_batch * n_queries,
            p_q + i_batch * stride_qb, p_k + i_batch * stride_kb, p_lse + i_batch * HEADS * n_queries, p_slopes,
            start, start_key, row, inside, key, end, seen,
            stride_ih, stride_it, stride_wh, stride_wt, stride_qh, stride_qt, stride_kh, stride_kt,
            scale, n_queries, n_keys,
            INDEX_HEADS, ID, BID, HEADS, REPEAT, D, BD, BM, BN, BIAS, INDEX_PRECISION, PRECISION, STAGES,
        )  # fmt: skip
        for j in tl.range(0, INDEX_HEADS, num_stages=STAGES):
            q = load_rows(p_index_q + tl.cast(j, tl.int64) * stride_ih, start, stride_it, n_queries, BM, ID, BID, True)
            p_w = p_weights + tl.cast(j, tl.int64) * stride_wh + row * stride_wt
            w = tl.load(p_w, mask=inside, other=0.0).to(tl.float32)
            x = tl.dot(q, tl.trans(k), input_precision=INDEX_PRECISION)
            dx = tl.where(x > 0, ds * w[:, None], 0.0).to(q.dtype)
            dk = tl.dot(tl.trans(dx), q, dk, input_precision=INDEX_PRECISION)
    dim = tl.arange(0, BID)
    o_dk = (i_batch * n_keys + key)[:, None] * ID + dim[None, :]
    tl.store(p_dk + o_dk, dk, mask=(key < n_keys)[:, None] & (dim < ID)[None, :])
