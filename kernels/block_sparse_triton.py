"""The Triton kernel of Block-Sparse FlashAttention and its launch: a dense scan of the scores, then attention over the
blocks of keys that it kept."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.block_sparse_reference import KEY_BLOCK, QUERY_BLOCK, diagonal_blocks, visible_blocks
from kernels.entmax_scan import nan_maximum
from kernels.launching import ceil_div, dot_precision, on_device, padded_head_dim, strides, unit_stride
from kernels.tiles import bit_or, listed_scores, load_rows
from kernels.tuning import launch_for, program_count

# arguments that vary with the input's length: Triton shall not compile for their values
LENGTHS = ["n_queries", "n_keys", "n_tasks", "n_blocks", "first_block", "offset", "n_words", "capacity", "n_positions"]


@triton.jit
def kept_word(
    q, p_k, stride_k, start, stop, threshold, slope, first, end, position, n_keys,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """int32 word, bit n of it: whether block start + n of keys has a score above the threshold (or NaN). At most 32.

    threshold: [BM], in units of the raw scores; +inf for rows that do not count.
    """
    marks = tl.zeros([BM, 4], tl.int32)
    for n in tl.range(0, stop - start, num_stages=STAGES):
        x = listed_scores(
            q, p_k, stride_k, start + n, slope, first, end, position, n_keys, D, BD, BN, BIAS, MASKED, PRECISION
        )  # [BM, BN]
        # maxima stay within a thread: the dot gives it columns 2 i and 2 i + 1 of every eight, for i one of four lanes
        pairs = tl.reduce(tl.reshape(x, (BM, BN // 8, 4, 2)), 3, nan_maximum)
        lanes = tl.reduce(pairs, 1, nan_maximum)  # [BM, 4]
        above = (lanes > threshold[:, None]) | (lanes != lanes)
        marks |= above.to(tl.int32) << n
    return tl.reduce(tl.reduce(marks, 1, bit_or), 0, bit_or)


@triton.jit
def list_blocks(
    p_list, p_bits, q, p_k, stride_k, lo, hi, n_before, threshold, limit, slope, first, end, position, n_keys,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr,
    STATS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Appends the kept ones of blocks [lo, hi) to the list, which has n_before entries. Returns its length.

    limit: the threshold as a scalar; at -inf every block is kept and no score is computed. p_bits: words that get the
        bits of kept blocks (if STATS), zeros before.
    """
    count = n_before
    n = tl.arange(0, 32)
    for start in range(lo, hi, 32):
        stop = tl.minimum(start + 32, hi)
        word = tl.where(stop - start == 32, -1, (1 << (stop - start)) - 1)
        if limit > float("-inf"):
            word = kept_word(
                q, p_k, stride_k, start, stop, threshold, slope, first, end, position, n_keys,
                D, BD, BM, BN, BIAS, MASKED, PRECISION, STAGES,
            )  # fmt: skip
        kept = (word >> n) & 1
        tl.store(p_list + count + tl.cumsum(kept, 0) - kept, start + n, mask=kept != 0)
        count += tl.sum(kept, 0)
        if STATS:
            block = start + n
            tl.atomic_or(p_bits + block // 32, 1 << (block % 32), mask=kept != 0)
    return count


@triton.jit
def attend(
    q, p_k, p_v, stride_k, stride_v, p_list, lo, hi, out, total, top, exp2_scale, slope, first, end, position, n_keys,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, LISTED: tl.constexpr, BIAS: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """FlashAttention-2's loop (arXiv:2307.08691) over entries [lo, hi) of the list or, unless LISTED, over blocks.

    out: [BM, BD], sum of p v; total: [BM], sum of p; top: [BM], running maximum of the raw scores.
    """
    for n in tl.range(lo, hi, num_stages=STAGES):
        block = n
        if LISTED:
            block = tl.load(p_list + n)
        x = listed_scores(
            q, p_k, stride_k, block, slope, first, end, position, n_keys, D, BD, BN, BIAS, MASKED, PRECISION
        )  # [BM, BN]
        new_top = tl.maximum(top, tl.max(x, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top * exp2_scale)  # rows that have seen no score yet
        p = tl.exp2(x * exp2_scale - shift[:, None])
        shrink = tl.exp2(top * exp2_scale - shift)
        total = total * shrink + tl.sum(p, 1)
        v = load_rows(p_v, block * BN, stride_v, n_keys, BN, D, BD, MASKED)  # [BN, BD]
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return out, total, top


@triton.jit(do_not_specialize=LENGTHS)
def block_sparse_softmax(
    p_q, p_k, p_v, p_thresholds, p_slopes, p_list, p_bits, p_counter, p_out,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot,
    scale, heads, repeat, n_queries, n_keys, n_tasks, n_blocks, first_block, offset, n_words, capacity, n_positions,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr,
    GATED: tl.constexpr, STATS: tl.constexpr, PRECISION: tl.constexpr, SCAN_STAGES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Programs take blocks of queries from a counter until none is left, long ones first within a head.

    p_thresholds: float32 (H, n_positions) (if GATED). p_list: int32 (programs, capacity). p_bits: int32 (B, H,
    n_blocks, n_words), zeros (if STATS and GATED). first_block: index, on the grid of positions, of the block of the
    first query. offset: position of query 0.
    """
    p_list += tl.program_id(0) * capacity
    task = tl.atomic_add(p_counter, 1)
    while task < n_tasks:
        i_bh, i_block = task // n_blocks, n_blocks - 1 - task % n_blocks
        i_batch, i_head = (i_bh // heads).to(tl.int64), i_bh % heads
        position = (first_block + i_block) * BM + tl.arange(0, BM)
        row, dim = position - offset, tl.arange(0, BD)
        inside = (row >= 0) & (row < n_queries)
        end = n_keys + tl.zeros([BM], tl.int32)
        if CAUSAL:
            end = tl.minimum(position + 1, n_keys)
        end = tl.where(inside, end, 0)
        first = tl.zeros([BM], tl.int32)
        slope = 0.0
        if BIAS:
            slope = tl.load(p_slopes + i_head) / scale
        mask = inside[:, None] & (dim < D)[None, :]
        p_rows = p_q + i_batch * stride_qb + i_head.to(tl.int64) * stride_qh
        q = tl.load(p_rows + row.to(tl.int64)[:, None] * stride_qt + dim[None, :], mask=mask, other=0.0)  # [BM, BD]
        p_keys = p_k + i_batch * stride_kb + (i_head // repeat).to(tl.int64) * stride_kh
        p_values = p_v + i_batch * stride_vb + (i_head // repeat).to(tl.int64) * stride_vh

        # blocks of keys: [0, before) and, unless causal, [after, hi) stand under the gate; all rows see those up to
        # `full` whole (the last query stands at the last key, so that this holds for all of [0, before))
        hi = (tl.maximum(tl.max(end, 0), 0) + BN - 1) // BN
        block_start = (first_block + i_block) * BM
        before = tl.minimum(tl.maximum(block_start, 0) // BN, hi)
        after = tl.minimum((tl.maximum(block_start + BM, 0) + BN - 1) // BN, hi)
        full = tl.maximum(n_keys // BN, after)
        n_full, n_kept = before, before
        if GATED:
            i_position = tl.minimum(tl.maximum(first_block + i_block, 0), n_positions - 1)
            limit = tl.load(p_thresholds + i_head * n_positions + i_position) / scale
            threshold = tl.where(inside, limit, float("inf"))
            p_words = p_bits
            if STATS:
                p_words += (i_bh.to(tl.int64) * n_blocks + i_block) * n_words
            n_full = list_blocks(
                p_list, p_words, q, p_keys, stride_kt, 0, before, 0, threshold, limit, slope,
                first, end, position, n_keys, D, BD, BM, BN, BIAS, False, STATS, PRECISION, SCAN_STAGES,
            )  # fmt: skip
            if not CAUSAL:
                n_full = list_blocks(
                    p_list, p_words, q, p_keys, stride_kt, after, full, n_full, threshold, limit, slope,
                    first, end, position, n_keys, D, BD, BM, BN, BIAS, False, STATS, PRECISION, SCAN_STAGES,
                )  # fmt: skip
                n_kept = list_blocks(
                    p_list, p_words, q, p_keys, stride_kt, full, hi, n_full, threshold, limit, slope,
                    first, end, position, n_keys, D, BD, BM, BN, BIAS, True, STATS, PRECISION, SCAN_STAGES,
                )  # fmt: skip
            tl.debug_barrier()  # the whole program reads the list next

        out = tl.zeros([BM, BD], tl.float32)
        total = tl.zeros([BM], tl.float32)
        top = tl.full([BM], float("-inf"), tl.float32)
        exp2_scale = scale * 1.4426950408889634
        out, total, top = attend(
            q, p_keys, p_values, stride_kt, stride_vt, p_list, before, after, out, total, top, exp2_scale, slope,
            first, end, position, n_keys, D, BD, BN, False, BIAS, True, PRECISION, STAGES,
        )  # fmt: skip
        out, total, top = attend(
            q, p_keys, p_values, stride_kt, stride_vt, p_list, 0, n_full, out, total, top, exp2_scale, slope,
            first, end, position, n_keys, D, BD, BN, GATED, BIAS, False, PRECISION, STAGES,
        )  # fmt: skip
        if not CAUSAL:
            if not GATED:
                out, total, top = attend(
                    q, p_keys, p_values, stride_kt, stride_vt, p_list, after, full, out, total, top, exp2_scale, slope,
                    first, end, position, n_keys, D, BD, BN, False, BIAS, False, PRECISION, STAGES,
                )  # fmt: skip
                n_full, n_kept = full, hi
            out, total, top = attend(
                q, p_keys, p_values, stride_kt, stride_vt, p_list, n_full, n_kept, out, total, top, exp2_scale, slope,
                first, end, position, n_keys, D, BD, BN, GATED, BIAS, True, PRECISION, STAGES,
            )  # fmt: skip

        out = out / tl.where(total == 0, 1.0, total)[:, None]  # 0 for rows that see no kept key
        p_rows = p_out + i_batch * stride_ob + i_head.to(tl.int64) * stride_oh
        pointers = p_rows + row.to(tl.int64)[:, None] * stride_ot + dim[None, :]
        tl.store(pointers, out.to(p_out.dtype.element_ty), mask=mask)
        tl.debug_barrier()  # the next task writes its list
        task = tl.atomic_add(p_counter, 1)


def block_sparse_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thresholds: Tensor | None,
    scale: float,
    causal: bool,
    alibi_slopes: Tensor | None,
    with_kept: bool,
) -> tuple[Tensor, Tensor | None]:
    """Arguments as in `block_sparse_softmax_attention`; nothing is checked here.

    Returns: out (B, H, Tq, D); kept as in BlockSparseStats, None unless with_kept.
    """
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    batch, heads, n_queries, head_dim = q.shape
    n_keys, offset = k.shape[2], k.shape[2] - n_queries
    out = torch.empty_like(q)
    first_block = offset // QUERY_BLOCK
    n_blocks, n_key_blocks = ceil_div(n_keys, QUERY_BLOCK) - first_block, ceil_div(n_keys, KEY_BLOCK)
    kept = None
    if with_kept:
        kept = visible_blocks(n_queries, n_keys, causal, q.device).repeat(batch, heads, 1, 1)
    if out.numel() == 0 or n_keys == 0:
        return out.zero_(), kept
    launch = launch_for("block_sparse", padded_head_dim(head_dim), q.dtype, q.device)
    n_tasks, n_words = batch * heads * n_blocks, ceil_div(n_key_blocks, 32)
    n_programs = program_count(launch, q.device, n_tasks)
    gated = thresholds is not None
    stats = with_kept and gated
    bits = torch.zeros((batch, heads, n_blocks, n_words) if stats else 0, dtype=torch.int32, device=q.device)
    with on_device(q):
        block_sparse_softmax[(n_programs,)](
            p_q=q,
            p_k=k,
            p_v=v,
            p_thresholds=None if thresholds is None else thresholds.contiguous(),
            p_slopes=None if alibi_slopes is None else alibi_slopes.float().contiguous(),
            p_list=torch.empty(n_programs * n_key_blocks if gated else 0, dtype=torch.int32, device=q.device),
            p_bits=bits,
            p_counter=torch.zeros(1, dtype=torch.int32, device=q.device),
            p_out=out,
            scale=scale,
            heads=heads,
            repeat=heads // k.shape[1],
            n_queries=n_queries,
            n_keys=n_keys,
            n_tasks=n_tasks,
            n_blocks=n_blocks,
            first_block=first_block,
            offset=offset,
            n_words=n_words,
            capacity=n_key_blocks,
            n_positions=0 if thresholds is None else thresholds.shape[1],
            D=head_dim,
            BD=padded_head_dim(head_dim),
            BM=QUERY_BLOCK,
            BN=KEY_BLOCK,
            CAUSAL=causal,
            BIAS=alibi_slopes is not None,
            GATED=gated,
            STATS=stats,
            PRECISION=dot_precision(q),
            SCAN_STAGES=launch.scan_stages,
            STAGES=launch.stages,
            **launch.options,
            **strides("q", q),
            **strides("k", k),
            **strides("v", v),
            **strides("o", out),
        )
    if stats and kept is not None:
        word = torch.arange(n_key_blocks, device=q.device)
        listed = ((bits[..., word // 32] >> (word % 32)) & 1).bool()[..., : kept.shape[3]]
        kept &= listed | diagonal_blocks(n_queries, n_keys, causal, q.device)
    return out, kept
