"""The Triton passes forward: which blocks a tile of queries reads, and attention over these. Log-sum-exps are of base
2."""

import triton
import triton.language as tl

from kernels.block_bias.tiles import (
    BIASES,
    FAR,
    LENGTHS,
    bias_rows,
    biased_scores,
    count_documents,
    head_slope,
    load_queries,
    next_document,
)
from kernels.block_sparse.passes import add_block, list_given
from kernels.common.tiles import head_offset, load_rows, store_rows


@triton.jit(do_not_specialize=LENGTHS)
def mark_live_blocks(
    p_bias, p_first, p_own, p_live, p_bounds, stride_bb, stride_bh, stride_bt, stride_row,
    heads, n_queries, n_keys, n_blocks,
    SIZE: tl.constexpr, BM: tl.constexpr, BOUNDS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program a tile of queries and head: which blocks any query reads, counted from its document, whichever that
    is. p_live: bytes (B, H, tiles, C). p_bounds: int32 (B, tiles, BOUNDS), alike for all heads."""
    i_tile, i_bh, n_tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    i_batch, i_head = i_bh // heads, i_bh % heads
    row, first, own = load_queries(p_first, p_own, i_batch, i_tile, stride_row, n_queries, n_keys, BM)
    sees = own >= first
    last = tl.where(sees, (own - first) // SIZE, -1)
    p_rows = bias_rows(p_bias, i_batch, i_head, row, stride_bb, stride_bh, stride_bt)
    p_live += (i_bh.to(tl.int64) * n_tiles + i_tile) * n_blocks
    for start in range(0, n_blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        mask = (block[None, :] <= last[:, None]) & (block < n_blocks)[None, :]
        bias = tl.load(p_rows[:, None] + block[None, :], mask=mask, other=float("-inf"))
        live = tl.max((bias != float("-inf")).to(tl.int32), 0)
        tl.store(p_live + block, live.to(tl.uint8), mask=block < n_blocks)
    if i_head == 0:
        least = tl.min(tl.where(sees, first, FAR), 0)
        most = tl.max(tl.where(sees, first, -1), 0)
        p_bounds += (i_batch * n_tiles + i_tile) * BOUNDS
        tl.store(p_bounds, least)
        tl.store(p_bounds + 1, tl.max(tl.where(sees, own, -1), 0))
        tl.store(p_bounds + 2, (least < most).to(tl.int32))


@triton.jit
def reads_any(p_rows, first, own, n_blocks, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    """bool [BM]: queries that read any block. p_rows: [BM], where a query's row of the bias begins."""
    found = tl.zeros_like(first)
    last = tl.where(own >= first, (own - first) // SIZE, -1)
    for start in range(0, n_blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        mask = (block[None, :] <= last[:, None]) & (block < n_blocks)[None, :]
        bias = tl.load(p_rows[:, None] + block[None, :], mask=mask, other=float("-inf"))
        found = tl.maximum(found, tl.max((bias != float("-inf")).to(tl.int32), 1))
    return found != 0


@triton.jit(do_not_specialize=LENGTHS)
def attend_live_blocks(
    p_q, p_k, p_v, p_bias, p_live, p_first, p_own, p_slopes, p_list, p_out, p_lse,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_bb, stride_bh, stride_bt, stride_ob, stride_oh, stride_ot, stride_row,
    scale, heads, repeat, n_queries, n_keys, n_blocks,
    SIZE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SLOPES: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program a tile of queries and head: a loop over its documents, mostly one, and over their live blocks.

    p_live: as `mark_live_blocks` leaves it. p_list: int32 (B * H, tiles, C), of each program its own. p_lse: float32
    (B, H, n)."""
    n_tiles, i_bh = tl.num_programs(0), tl.program_id(1)
    i_tile = n_tiles - 1 - tl.program_id(0)  # the ones with the most keys first
    i_batch, i_head = i_bh // heads, i_bh % heads
    i_group = i_head // repeat
    row, first, own = load_queries(p_first, p_own, i_batch, i_tile, stride_row, n_queries, n_keys, BM)
    p_rows = bias_rows(p_bias, i_batch, i_head, row, stride_bb, stride_bh, stride_bt)
    o_program = (i_bh.to(tl.int64) * n_tiles + i_tile) * n_blocks
    p_live, p_list = p_live + o_program, p_list + o_program
    q = load_rows(
        p_q + head_offset(i_batch, i_head, stride_qb, stride_qh), i_tile * BM, stride_qt, n_queries, BM, D, BD, True
    )  # fmt: skip
    keys = p_k + head_offset(i_batch, i_group, stride_kb, stride_kh)
    values = p_v + head_offset(i_batch, i_group, stride_vb, stride_vh)
    slope = head_slope(p_slopes, i_head, scale, SLOPES)

    CHUNKS: tl.constexpr = (SIZE + BN - 1) // BN
    exp2_scale = scale * 1.4426950408889634
    out = tl.zeros([BM, BD], tl.float32)
    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
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
            out, total, top = add_block(x, v, out, total, top, exp2_scale, PRECISION)
        tl.debug_barrier()  # before the next document's list
    empty = (total == 0) & (own >= first)
    if tl.max(empty.to(tl.int32), 0) != 0:  # rows that read nothing are 0; if all scores are -inf, NaN, as in softmax
        total = tl.where(empty & reads_any(p_rows, first, own, n_blocks, SIZE, BIASES), float("nan"), total)
    safe = tl.where(total == 0, 1.0, total)
    p_out += head_offset(i_batch, i_head, stride_ob, stride_oh)
    store_rows(p_out, out / safe[:, None], i_tile * BM, stride_ot, n_queries, BM, D, BD)
    lse = tl.where(total == 0, float("-inf"), top * exp2_scale + tl.log2(safe))
    tl.store(p_lse + i_bh.to(tl.int64) * n_queries + row, lse, mask=row < n_queries)
