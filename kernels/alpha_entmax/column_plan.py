"""How the pass over keys is shared among programs: what each key tile costs is counted before it starts, and tiles that
cost more than a program's share (attention sinks: every query weighs them) are cut into parts, whose sums are added in
order. So the longest task is short, and the same inputs still give the same bits.

A step is a product of STEP queries with one key tile. Items are (batch, key head, key tile), in this order.
"""

import triton
import triton.language as tl

from kernels.common.key_lists import is_sparse, row_words
from kernels.common.tiles import LENGTHS, head_offset, store_rows

PLAN_FIELDS = tl.constexpr(3)  # of a part: item, first step, step after the last
CUT_FIELDS = tl.constexpr(2)  # of an item: its first part, how many (0 where it is not cut)
COUNTED = tl.constexpr(128)  # words of 32 key tiles at once


@triton.jit
def count_bits(p, stride, first, stop, part, n_parts):
    """int32 [32]: how many of the words p[stride i], first <= i < stop, have each bit. Counts one of n_parts shares."""
    total = tl.zeros([COUNTED, 32], tl.int32)
    for start in range(first + part * COUNTED, stop, n_parts * COUNTED):
        i = start + tl.arange(0, COUNTED)
        word = tl.load(p + i.to(tl.int64) * stride, mask=i < stop, other=0)
        total += (word[:, None] >> tl.arange(0, 32)[None, :]) & 1
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=LENGTHS)
def count_columns(
    p_bits, p_row_bits, p_tile_counts, p_query_counts, n_queries, n_blocks, n_key_blocks, n_words, stride_row_bits,
    triangular,
    KEYS: tl.constexpr,
):  # fmt: skip
    """One program per (batch and head, word of 32 key tiles, part of the queries). p_tile_counts, p_query_counts: int32
    (B, H, key tiles), zeros before: query tiles marked in p_bits and (if KEYS) queries in p_row_bits. Integers: any
    order of the parts gives the same."""
    i_bh, i_word, part, n_parts = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    tile = i_word * 32 + tl.arange(0, 32)
    o_count = i_bh.to(tl.int64) * n_key_blocks + tile
    p_words = p_bits + i_bh.to(tl.int64) * n_blocks * n_words + i_word
    count = count_bits(p_words, n_words, 0, n_blocks, part, n_parts)
    tl.atomic_add(p_tile_counts + o_count, count, mask=(tile < n_key_blocks) & (count > 0))
    if KEYS:
        p_rows = row_words(p_row_bits + i_bh.to(tl.int64) * stride_row_bits, i_word, n_queries, triangular)
        first = tl.where(triangular != 0, 2048 * i_word, 0)  # row_words leaves out those before
        count = count_bits(p_rows, 1, first, n_queries, part, n_parts)
        tl.atomic_add(p_query_counts + o_count, count, mask=(tile < n_key_blocks) & (count > 0))


@triton.jit
def column_steps(
    p_tile_counts, p_query_counts, o_count, BM: tl.constexpr, STEP: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """Steps of key tiles for one query head, and whether they follow single queries."""
    tiles = tl.load(p_tile_counts + o_count)
    steps, sparse = tiles * (BM // STEP), tiles < 0
    if KEYS:
        queries = tl.load(p_query_counts + o_count)
        sparse = is_sparse(queries, tiles)
        steps = tl.where(sparse, (queries + STEP - 1) // STEP, steps)
    return steps, sparse


@triton.jit
def item_steps(
    p_tile_counts, p_query_counts, item, n_items, n_key_blocks, repeat,
    BM: tl.constexpr, STEP: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Steps of items over the query heads that share their key head, 0 past n_items."""
    total = tl.zeros_like(item)
    one = tl.minimum(item, n_items - 1)
    for i_repeat in range(0, repeat):
        o_count = (one // n_key_blocks * repeat + i_repeat).to(tl.int64) * n_key_blocks + one % n_key_blocks
        steps, _ = column_steps(p_tile_counts, p_query_counts, o_count, BM, STEP, KEYS)
        total += steps
    return tl.where(item < n_items, total, 0)


@triton.jit
def parts_of(steps, share):
    """Into how many parts items are cut: those of two shares or more into as many as they have, others not (0)."""
    parts = steps // share
    length = tl.cdiv(steps, tl.maximum(parts, 1))
    return tl.where(parts > 1, tl.cdiv(steps, tl.maximum(length, 1)), 0)  # as many as lengths leave no part empty


@triton.jit(do_not_specialize=[*LENGTHS, "max_parts", "shares"])
def plan_columns(
    p_tile_counts, p_query_counts, p_parts, p_cuts, p_n_parts, n_items, n_key_blocks, repeat, max_parts, shares,
    LEAST: tl.constexpr, BM: tl.constexpr, STEP: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One program. A share is one of `shares` equal shares of all steps, but no less than LEAST steps, and doubled
    until at most max_parts parts are of that length. p_parts: int32 (max_parts, 3). p_cuts: int32 (items, 2).
    p_n_parts: int32, how many parts."""
    total = tl.zeros([SIZE], tl.int64)
    for start in range(0, n_items, SIZE):
        item = start + tl.arange(0, SIZE)
        total += item_steps(p_tile_counts, p_query_counts, item, n_items, n_key_blocks, repeat, BM, STEP, KEYS)
    share = tl.maximum((tl.sum(total, 0) + shares - 1) // shares, LEAST).to(tl.int32)
    n_parts = max_parts + 1
    while n_parts > max_parts:
        n_parts = 0
        for start in range(0, n_items, SIZE):
            item = start + tl.arange(0, SIZE)
            steps = item_steps(p_tile_counts, p_query_counts, item, n_items, n_key_blocks, repeat, BM, STEP, KEYS)
            n_parts += tl.sum(parts_of(steps, share), 0)
        share = tl.where(n_parts > max_parts, 2 * share, share)
    n_parts = 0
    for start in range(0, n_items, SIZE):
        item = start + tl.arange(0, SIZE)
        steps = item_steps(p_tile_counts, p_query_counts, item, n_items, n_key_blocks, repeat, BM, STEP, KEYS)
        parts = parts_of(steps, share)
        part = n_parts + tl.cumsum(parts, 0) - parts
        tl.store(p_cuts + item * CUT_FIELDS, part, mask=item < n_items)
        tl.store(p_cuts + item * CUT_FIELDS + 1, parts, mask=item < n_items)
        length = tl.cdiv(steps, tl.maximum(parts, 1))
        for i in range(0, tl.max(parts, 0)):
            p = p_parts + (part + i) * PLAN_FIELDS
            tl.store(p, item, mask=i < parts)
            tl.store(p + 1, i * length, mask=i < parts)
            tl.store(p + 2, tl.minimum((i + 1) * length, steps), mask=i < parts)
        n_parts += tl.sum(parts, 0)
    tl.store(p_n_parts, n_parts)


@triton.jit(do_not_specialize=LENGTHS)
def add_parts(
    p_sums, p_cuts, p_dk, p_dv, stride_db, stride_dh, stride_dt, stride_eb, stride_eh, stride_et,
    groups, n_keys, n_key_blocks,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """One program per (item, ROWS of its keys): dk and dv of items that were cut, from float32 p_sums
    (parts, 2, BM, BD), AT_ONCE parts at a time."""
    item, first_row = tl.program_id(0), tl.program_id(1) * ROWS
    part = tl.load(p_cuts + item * CUT_FIELDS)
    n_parts = tl.load(p_cuts + item * CUT_FIELDS + 1)
    if n_parts > 0:
        i_bg, i_key_block = item // n_key_blocks, item % n_key_blocks
        place = (first_row + tl.arange(0, ROWS))[None, :, None] * BD + tl.arange(0, BD)[None, None, :]
        dk, dv = tl.zeros([ROWS, BD], tl.float32), tl.zeros([ROWS, BD], tl.float32)
        for start in range(0, n_parts, AT_ONCE):
            i = start + tl.arange(0, AT_ONCE)
            p = p_sums + (part + i).to(tl.int64)[:, None, None] * (2 * BM * BD) + place
            mask = (i < n_parts)[:, None, None]
            dk += tl.sum(tl.load(p, mask=mask, other=0.0), 0)
            dv += tl.sum(tl.load(p + BM * BD, mask=mask, other=0.0), 0)
        o_d = head_offset(i_bg // groups, i_bg % groups, stride_db, stride_dh)
        o_e = head_offset(i_bg // groups, i_bg % groups, stride_eb, stride_eh)
        start = i_key_block * BM + first_row
        store_rows(p_dk + o_d, dk, start, stride_dt, n_keys, ROWS, D, BD)
        store_rows(p_dv + o_e, dv, start, stride_et, n_keys, ROWS, D, BD)
