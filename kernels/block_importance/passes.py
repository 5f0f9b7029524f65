"""The Triton passes: log-sum-exps of each query head's scores with compressed keys, then the weights that follow from
them, divided among blocks and summed over the heads that share keys. Scores are computed in both, and never written.

Softmax does not change where a query's scores move together, so that distances to compressed keys count in keys, from
the last one that the query sees.
"""

import triton
import triton.language as tl

from kernels.block_bias.tiles import FAR, count_documents, head_slope
from kernels.common.key_lists import gather_rows
from kernels.common.tiles import add_position_bias, head_offset, load_rows
from kernels.lightning_indexer.log_sum_exp import add_powers, log_sum
from kernels.lightning_indexer.tiles import key_range

# arguments that vary with the input's length: Triton shall not compile for their values
LENGTHS = ["n_queries", "n_keys", "n_blocks", "stride_first", "stride_position"]


@triton.jit
def load_places(
    p_first, p_position, i_batch, row, stride_first, stride_position, n_queries, n_keys,
    LENGTH: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Of queries `row`, each [BM]: the first key of their documents (FAR past the last query), positions, and the last
    key that they see (the one before the first where they see none; whatever stands in memory, all are keys)."""
    inside = row < n_queries
    first = tl.load(p_first + i_batch * stride_first + row, mask=inside, other=FAR).to(tl.int32)
    position = tl.load(p_position + i_batch * stride_position + row, mask=inside, other=0).to(tl.int32)
    first = tl.maximum(first, 0)
    past = position + 1 - LENGTH
    last = tl.where(past >= 0, first + tl.maximum(past, 0) // STRIDE, first - 1)
    return first, position, tl.maximum(tl.minimum(last, n_keys - 1), first - 1)


@triton.jit
def key_scores(q, k, key, anchor, last, slope, SLOPES: tl.constexpr, PRECISION: tl.constexpr):
    """Raw scores (bias in the same units), but for what all keys of a query have alike. q: [BM, BD], k: [BN, BD], last:
    [BM], key: [BN]. anchor: a key that distances are counted from."""
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if SLOPES:
        x = add_position_bias(x, last[:, None], key[None, :], anchor, slope)
    return x


@triton.jit(do_not_specialize=LENGTHS)
def log_sum_exps(
    p_q, p_k, p_first, p_position, p_slopes, p_lse,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_first, stride_position,
    scale, heads, n_queries, n_keys,
    LENGTH: tl.constexpr, STRIDE: tl.constexpr, REPEAT: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SLOPES: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program a tile of BM queries and query head: a loop over the keys that any of them sees.

    p_lse: float32 (B, H, n), of base 2, 0 for queries that see no key, NaN for what a softmax makes NaN."""
    i_tile, i_bh = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # long ones first
    i_batch, i_head = i_bh // heads, i_bh % heads
    row = i_tile * BM + tl.arange(0, BM)
    first, _, last = load_places(
        p_first, p_position, i_batch, row, stride_first, stride_position, n_queries, n_keys, LENGTH, STRIDE
    )  # fmt: skip
    lo, hi = key_range(first, last + 1, BN)
    q = load_rows(
        p_q + head_offset(i_batch, i_head, stride_qb, stride_qh), i_tile * BM, stride_qt, n_queries, BM, D, BD, True
    )  # fmt: skip
    p_k += head_offset(i_batch, i_head // REPEAT, stride_kb, stride_kh)
    slope = head_slope(p_slopes, i_head, scale, SLOPES) * STRIDE
    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    exp2_scale = scale * 1.4426950408889634
    for start in tl.range(lo, hi, BN, num_stages=STAGES):
        key = start + tl.arange(0, BN)
        k = load_rows(p_k, start, stride_kt, n_keys, BN, D, BD, True)
        x = key_scores(q, k, key, start, last, slope, SLOPES, PRECISION)
        seen = (key[None, :] >= first[:, None]) & (key[None, :] <= last[:, None])
        total, top = add_powers(tl.where(seen, x, float("-inf")), total, top, exp2_scale)
    total = tl.where((total == 0) & (last >= first), float("nan"), total)  # all scores -inf: NaN, as in softmax
    tl.store(p_lse + i_bh.to(tl.int64) * n_queries + row, log_sum(total, top, exp2_scale), mask=row < n_queries)


@triton.jit
def mark_always_chosen(importance, block, position, SIZE: tl.constexpr, LOCAL: tl.constexpr):
    """inf for block 0 and the last LOCAL ones up to a query's own, -inf behind it. block: [BN], position: [BM]."""
    own = (position // SIZE)[:, None]
    always = (block[None, :] == 0) | (block[None, :] > own - LOCAL)
    importance = tl.where(always, float("inf"), importance)
    return tl.where(block[None, :] > own, float("-inf"), importance)


@triton.jit(do_not_specialize=LENGTHS)
def spread_weights(
    p_q, p_k, p_first, p_position, p_slopes, p_lse, p_out,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_first, stride_position,
    scale, groups, n_queries, n_keys, n_blocks,
    LENGTH: tl.constexpr, STRIDE: tl.constexpr, SIZE: tl.constexpr, LOCAL: tl.constexpr, REPEAT: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SLOPES: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program a tile of BM queries, of BN blocks and key head: a loop over the tile's documents, mostly one, over
    the query heads, and over the keys that share tokens with a block, of all BN blocks at once.

    p_lse: as `log_sum_exps` leaves it. p_out: float32 (B, G, n, C), each written once. LOCAL: 0 for no marks."""
    i_column, i_tile, i_bg = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1), tl.program_id(2)
    i_batch, i_group = i_bg // groups, i_bg % groups
    row = i_tile * BM + tl.arange(0, BM)
    first, position, last = load_places(
        p_first, p_position, i_batch, row, stride_first, stride_position, n_queries, n_keys, LENGTH, STRIDE
    )  # fmt: skip
    block = i_column * BN + tl.arange(0, BN)
    p_k += head_offset(i_batch, i_group, stride_kb, stride_kh)
    p_rows = p_out + (i_bg.to(tl.int64) * n_queries + row)[:, None] * n_blocks
    exp2_scale = scale * 1.4426950408889634
    BEFORE: tl.constexpr = LENGTH // STRIDE - 1  # keys that begin before a block and reach into it
    start = -1
    for _ in tl.range(0, count_documents(first), num_stages=1):
        start = tl.min(tl.where(first > start, first, FAR), 0)
        mine = first == start
        end = tl.max(tl.where(mine & (last >= first), last, -1), 0) + 1
        least = i_column * BN * (SIZE // STRIDE) - BEFORE  # of the document's keys, that the first block looks at
        total = tl.zeros([BM, BN], tl.float32)
        for r in tl.range(0, tl.where(least < end - start, REPEAT, 0), num_stages=1):
            i_head = i_group * REPEAT + r
            p_head = p_q + head_offset(i_batch, i_head, stride_qb, stride_qh)
            q = load_rows(p_head, i_tile * BM, stride_qt, n_queries, BM, D, BD, True)
            p_sums = p_lse + (i_bg.to(tl.int64) * REPEAT + r) * n_queries + row
            lse = tl.load(p_sums, mask=row < n_queries, other=0.0)
            slope = head_slope(p_slopes, i_head, scale, SLOPES) * STRIDE
            for step in tl.range(0, (SIZE + LENGTH) // STRIDE - 1, num_stages=STAGES):
                offset = step - BEFORE
                shared = tl.minimum(offset + LENGTH // STRIDE, SIZE // STRIDE) - tl.maximum(offset, 0)  # strides
                key = start + block * (SIZE // STRIDE) + offset
                there = (key >= start) & (key < end)
                k = gather_rows(p_k, tl.where(there, key, -1), stride_kt, D, BD, True)
                x = key_scores(q, k, key, start, last, slope, SLOPES, PRECISION)
                seen = there[None, :] & mine[:, None] & (key[None, :] <= last[:, None])
                weights = tl.exp2(tl.where(seen, x * exp2_scale - lse[:, None], float("-inf")))
                total += weights * shared.to(tl.float32)
        if LOCAL:
            total = mark_always_chosen(total, block, position, SIZE, LOCAL)
        tl.store(p_rows + block[None, :], total, mask=(mine & (row < n_queries))[:, None] & (block < n_blocks)[None, :])
