"""Device functions: which keys rows see, the indexer's scores, attention's weights, and how far they are apart."""

import triton
import triton.language as tl

from kernels.common.tiles import add_position_bias, is_visible, load_rows, nan_maximum

# arguments that vary with the input's length: Triton shall not compile for their values
LENGTHS = ["n_queries", "n_keys", "search_steps", "stride_rows", "stride_bits"]


@triton.jit
def load_intervals(p_first, p_own, row, inside):
    """First and end of each row's keys, int32 [rows], first = end where it sees none."""
    first = tl.maximum(tl.load(p_first + row, mask=inside, other=0).to(tl.int32), 0)
    end = tl.load(p_own + row, mask=inside, other=-1).to(tl.int32) + 1
    return first, tl.maximum(end, first)


@triton.jit
def key_range(first, end, BN: tl.constexpr):
    """Keys [lo, hi) that any row sees, lo rounded down to tiles of BN; [0, 0) where none sees one: loads that a
    pipelined loop issues ahead are guarded by lo + BN < hi, which a lo near the largest integer would pass by overflow.
    """
    hi = tl.max(tl.where(first < end, end, 0), 0)
    return tl.min(tl.where(first < end, first, hi), 0) // BN * BN, hi


@triton.jit
def count_below(p, value, n, search_steps):
    """How many of n numbers, none smaller than the one before it, are below `value`."""
    lo, hi = tl.cast(value, tl.int32) * 0, tl.cast(value, tl.int32) * 0 + n
    for _ in range(search_steps):
        middle = (lo + hi) // 2
        below = (tl.load(p + tl.minimum(middle, n - 1)).to(tl.int32) < value) & (middle < hi)
        lo, hi = tl.where(below, middle + 1, lo), tl.where(below, hi, middle)
    return lo


@triton.jit
def seen_keys(
    p_bits, start, start_key, first, end, stride_bits, n_queries,
    CHOSEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """bool [BM rows from `start`, BN keys from `start_key`], both multiples of 8. p_bits: uint8 (n, stride_bits), where
    key j is bit j % 8 of byte j // 8 (if CHOSEN)."""
    key = start_key + tl.arange(0, BN)
    seen = is_visible(key[None, :], first[:, None], end[:, None])
    if CHOSEN:
        row, byte = start + tl.arange(0, BM), start_key // 8 + tl.arange(0, BN // 8)
        p_bytes = p_bits + (tl.cast(start, tl.int64) * stride_bits + tl.arange(0, BM) * stride_bits)[:, None]
        there = (row < n_queries)[:, None] & (byte < stride_bits)[None, :]
        value = tl.load(p_bytes + byte[None, :], mask=there, other=0).to(tl.int32)
        bits = (value[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
        seen = seen & (tl.reshape(bits, [BM, BN]) != 0)
    return seen


@triton.jit
def index_scores(
    p_q, p_weights, k, start, row, inside, stride_qh, stride_qt, stride_wh, stride_wt, n_queries,
    HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """I, float32 [BM rows from `start`, BN keys]: the sum over heads of weight * ReLU(q k). k: [BN, BD]."""
    scores = tl.zeros([BM, BN], tl.float32)
    for j in tl.range(0, HEADS, num_stages=STAGES):
        q = load_rows(p_q + tl.cast(j, tl.int64) * stride_qh, start, stride_qt, n_queries, BM, D, BD, True)
        p_w = p_weights + tl.cast(j, tl.int64) * stride_wh + row * stride_wt
        w = tl.load(p_w, mask=inside, other=0.0).to(tl.float32)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores += w[:, None] * nan_maximum(x, 0.0)
    return scores


@triton.jit
def attention_scores(q, k, key, end, start_key, slope, BIAS: tl.constexpr, PRECISION: tl.constexpr):
    """Raw scores (bias in the same units) of one head, [rows, keys]. end: the key behind each row's own, [rows]."""
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if BIAS:
        x = add_position_bias(x, (end - 1)[:, None], key[None, :], start_key, slope)
    return x


@triton.jit
def mean_weights(
    p_q, p_k, p_lse, p_slopes, start, start_key, row, inside, key, end, seen,
    stride_qh, stride_qt, stride_kh, stride_kt, scale, n_queries, n_keys,
    HEADS: tl.constexpr, REPEAT: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention's weights, averaged over heads, 0 where not seen, float32 [BM, BN]. p_lse: of each head, of base 2."""
    p = tl.zeros([BM, BN], tl.float32)
    exp2_scale = scale * 1.4426950408889634
    for h in tl.range(0, HEADS, num_stages=STAGES):
        q = load_rows(p_q + tl.cast(h, tl.int64) * stride_qh, start, stride_qt, n_queries, BM, D, BD, True)
        p_keys = p_k + tl.cast(h // REPEAT, tl.int64) * stride_kh
        k = load_rows(p_keys, start_key, stride_kt, n_keys, BN, D, BD, True)
        slope = 0.0
        if BIAS:
            slope = tl.load(p_slopes + h) / scale
        x = attention_scores(q, k, key, end, start_key, slope, BIAS, PRECISION)
        lse = tl.load(p_lse + tl.cast(h, tl.int64) * n_queries + row, mask=inside, other=0.0)
        p += tl.exp2(tl.where(seen, x * exp2_scale - lse[:, None], float("-inf")))
    return p * (1.0 / HEADS)


@triton.jit
def compared(
    p_index_q, p_weights, index_k, p_index_lse, p_q, p_k, p_lse, p_slopes,
    start, start_key, row, inside, key, end, seen,
    stride_ih, stride_it, stride_wh, stride_wt, stride_qh, stride_qt, stride_kh, stride_kt,
    scale, n_queries, n_keys,
    INDEX_HEADS: tl.constexpr, ID: tl.constexpr, BID: tl.constexpr, HEADS: tl.constexpr, REPEAT: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr,
    INDEX_PRECISION: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """p, log2 softmax(I), and softmax(I) - p, the loss's gradient with respect to I; each [BM, BN], 0 where not seen,
    but for the logarithm."""
    scores = index_scores(
        p_index_q, p_weights, index_k, start, row, inside, stride_ih, stride_it, stride_wh, stride_wt, n_queries,
        INDEX_HEADS, ID, BID, BM, BN, INDEX_PRECISION, STAGES,
    )  # fmt: skip
    lse = tl.load(p_index_lse + row, mask=inside, other=0.0)
    log_q = scores * 1.4426950408889634 - lse[:, None]
    p = mean_weights(
        p_q, p_k, p_lse, p_slopes, start, start_key, row, inside, key, end, seen,
        stride_qh, stride_qt, stride_kh, stride_kt, scale, n_queries, n_keys,
        HEADS, REPEAT, D, BD, BM, BN, BIAS, PRECISION, STAGES,
    )  # fmt: skip
    return p, log_q, tl.exp2(tl.where(seen, log_q, float("-inf"))) - p
