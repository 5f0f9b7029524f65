"""The Triton passes forward: a query at a time, or a block at a time with a merge. Log-sum-exps are of base 2."""

import triton
import triton.language as tl

from kernels.block_sparse.passes import add_block
from kernels.common.tiles import head_offset
from kernels.selected_blocks.tiles import LENGTHS, block_keys, gather_rows, listed_rows, row_slopes, seen_scores


@triton.jit(do_not_specialize=LENGTHS)
def attend_by_query(
    p_q, p_k, p_v, p_first, p_own, p_slopes, p_out, p_lse,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, stride_own,
    scale, n_queries, n_keys, groups, count,
    SIZE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, REPEAT: tl.constexpr, BM: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program a query and group: a loop over the query's blocks, its REPEAT heads padded to BM rows.

    p_first: int32 (B, G, n, count). p_own: int32 (B or 1, n). p_lse: float32 (B, H, n)."""
    i_query, i_bg = tl.program_id(0), tl.program_id(1)
    i_batch, i_group = i_bg // groups, i_bg % groups
    row = tl.arange(0, BM)
    inside = row < REPEAT
    head = i_group * REPEAT + row
    query = tl.zeros([BM], tl.int32) + i_query
    q = gather_rows(p_q + i_batch.to(tl.int64) * stride_qb, head, query, stride_qh, stride_qt, inside, D, BD)
    own = tl.load(p_own + i_batch * stride_own + query)  # [BM]
    slope = row_slopes(p_slopes, head, inside, scale, BIAS)
    keys = p_k + head_offset(i_batch, i_group, stride_kb, stride_kh)
    values = p_v + head_offset(i_batch, i_group, stride_vb, stride_vh)
    p_first += (i_bg.to(tl.int64) * n_queries + i_query) * count

    CHUNKS: tl.constexpr = (SIZE + BN - 1) // BN
    out = tl.zeros([BM, BD], tl.float32)
    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    exp2_scale = scale * 1.4426950408889634
    none = tl.zeros([BN], tl.int32)
    for n in tl.range(0, count * CHUNKS, num_stages=STAGES):
        first = tl.load(p_first + n // CHUNKS)
        key, there = block_keys(first, n % CHUNKS, n_keys, SIZE, BN)
        there = there & (key <= tl.max(own, 0))
        k = gather_rows(keys, none, key, 0, stride_kt, there, D, BD)
        v = gather_rows(values, none, key, 0, stride_vt, there, D, BD)
        x = seen_scores(q, k, key, there, first, own, slope, inside, BIAS, PRECISION)
        out, total, top = add_block(x, v, out, total, top, exp2_scale, PRECISION)
    dim = tl.arange(0, BD)
    safe = tl.where(total == 0, 1.0, total)  # rows that read nothing are 0
    p_row = p_out + head_offset(i_batch, head, stride_ob, stride_oh) + i_query.to(tl.int64) * stride_ot
    value = (out / safe[:, None]).to(p_out.dtype.element_ty)
    tl.store(p_row[:, None] + dim[None, :], value, mask=inside[:, None] & (dim < D)[None, :])
    lse = tl.where(total == 0, float("-inf"), top * exp2_scale + tl.log2(safe))
    tl.store(p_lse + (i_bg.to(tl.int64) * REPEAT + row) * n_queries + i_query, lse, mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def attend_by_key(
    p_q, p_k, p_v, p_order, p_parts, p_own, p_slopes, p_part_out, p_part_lse,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, stride_own,
    scale, n_queries, n_keys, groups, count,
    SIZE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, REPEAT: tl.constexpr, BM: tl.constexpr,
    FIELDS: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program a part of a block's readers and tile of BN keys of the block: a loop over tiles of BM rows, pairs of
    a reader and a query head. Each row leaves its softmax over these keys and the log-sum-exp, for `merge_slots`.

    p_order, p_parts: of `readers.Readers`. p_part_out, p_part_lse: float32 (B, G, n, count, chunks, REPEAT, D) and
    without D."""
    i_part, chunk = tl.program_id(0), tl.program_id(1)
    p_part = p_parts + i_part * FIELDS
    i_bg, first, begin, end = tl.load(p_part), tl.load(p_part + 1), tl.load(p_part + 2), tl.load(p_part + 3)
    i_batch, i_group = i_bg // groups, i_bg % groups
    key, there = block_keys(first, chunk, n_keys, SIZE, BN)
    none = tl.zeros([BN], tl.int32)
    there = there & (begin < end)
    k = gather_rows(
        p_k + head_offset(i_batch, i_group, stride_kb, stride_kh), none, key, 0, stride_kt, there, D, BD
    )  # fmt: skip
    v = gather_rows(
        p_v + head_offset(i_batch, i_group, stride_vb, stride_vh), none, key, 0, stride_vt, there, D, BD
    )  # fmt: skip
    p_q += i_batch.to(tl.int64) * stride_qb
    CHUNKS: tl.constexpr = (SIZE + BN - 1) // BN
    dim = tl.arange(0, BD)
    exp2_scale = scale * 1.4426950408889634
    for tile in tl.range(0, ((end - begin) * REPEAT + BM - 1) // BM, num_stages=STAGES):
        inside, pair, query, member = listed_rows(p_order, tile, begin, end, n_queries, count, REPEAT, BM)
        head = i_group * REPEAT + member
        q = gather_rows(p_q, head, query, stride_qh, stride_qt, inside, D, BD)
        own = tl.load(p_own + i_batch * stride_own + query, mask=inside, other=0)
        slope = row_slopes(p_slopes, head, inside, scale, BIAS)
        x = seen_scores(q, k, key, there, first, own, slope, inside, BIAS, PRECISION)
        top = tl.max(x, 1)
        shift = tl.where(top == float("-inf"), 0.0, top * exp2_scale)
        p = tl.exp2(x * exp2_scale - shift[:, None])
        total = tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        safe = tl.where(total == 0, 1.0, total)
        lse = tl.where(total == 0, float("-inf"), shift + tl.log2(safe))
        o_row = (pair.to(tl.int64) * CHUNKS + chunk) * REPEAT + member
        tl.store(p_part_lse + o_row, lse, mask=inside)
        p_rows = p_part_out + o_row[:, None] * D + dim[None, :]
        tl.store(p_rows, out / safe[:, None], mask=inside[:, None] & (dim < D)[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def merge_slots(
    p_parts, p_part_lse, p_first, p_out, p_lse,
    stride_ob, stride_oh, stride_ot, stride_lb, stride_lh, stride_lt,
    factor, n_rows, n_queries, n_keys, groups, count,
    CHUNKS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, REPEAT: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr,
    SOFTMAX: tl.constexpr,
):  # fmt: skip
    """One program a tile of BM rows of (B, G, n, REPEAT): what their blocks have left, summed in order. SOFTMAX: the
    parts are softmax averages, weighed by their log-sum-exps; else they are added and multiplied by `factor`.

    p_parts, p_part_lse: as `attend_by_key` leaves them. p_lse: float32 (B, H, n) (if SOFTMAX). BS: at least the slots,
    count * CHUNKS."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = row < n_rows
    i_reader, member = row // REPEAT, row % REPEAT
    query, i_bg = i_reader % n_queries, i_reader // n_queries
    i_batch, head = i_bg // groups, i_bg % groups * REPEAT + member
    p_first += i_reader.to(tl.int64) * count
    o_part = i_reader.to(tl.int64) * count * CHUNKS * REPEAT + member
    lse = tl.zeros([BM], tl.float32)
    if SOFTMAX:
        slot = tl.arange(0, BS)
        m_slot = inside[:, None] & (slot < count * CHUNKS)[None, :]
        firsts = tl.load(p_first[:, None] + slot[None, :] // CHUNKS, mask=m_slot, other=-1)
        m_slot = m_slot & (firsts >= 0) & (firsts < n_keys)  # what nobody has written is not read
        each = tl.load(p_part_lse + o_part[:, None] + slot[None, :] * REPEAT, mask=m_slot, other=float("-inf"))
        top = tl.max(each, 1)
        shift = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.exp2(each - shift[:, None]), 1)
        lse = shift + tl.log2(tl.where(total == 0, 1.0, total))
        found = tl.where(total == 0, float("-inf"), lse)
        tl.store(p_lse + head_offset(i_batch, head, stride_lb, stride_lh) + query * stride_lt, found, mask=inside)
    dim = tl.arange(0, BD)
    out = tl.zeros([BM, BD], tl.float32)
    for slot in range(0, count * CHUNKS):
        first = tl.load(p_first + slot // CHUNKS, mask=inside, other=-1)
        mask = (first >= 0) & (first < n_keys)
        o_row = o_part + slot * REPEAT
        part = tl.load(
            p_parts + o_row[:, None] * D + dim[None, :], mask=mask[:, None] & (dim < D)[None, :], other=0.0
        )  # fmt: skip
        if SOFTMAX:
            weight = tl.exp2(tl.load(p_part_lse + o_row, mask=mask, other=float("-inf")) - lse)
            out += weight[:, None] * part
        else:
            out += part
    p_row = p_out + head_offset(i_batch, head, stride_ob, stride_oh) + query.to(tl.int64) * stride_ot
    value = (out * factor).to(p_out.dtype.element_ty)
    tl.store(p_row[:, None] + dim[None, :], value, mask=inside[:, None] & (dim < D)[None, :])
