"""The Triton kernel of Block-Sparse FlashAttention and its launch.

Two designs of the gate: *listed*, a dense scan of the scores lists the kept blocks of keys, then attention over the
list; *fused*, attention over all blocks with a branch around the rest of each. tuning.py says where which is faster.
Blocks that are given are listed without a scan.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.block_sparse.passes import attend, list_given, list_off_diagonal
from kernels.block_sparse.reference import KEY_BLOCK, diagonal_blocks, grid_of_blocks, visible_blocks
from kernels.block_sparse.tuning import block_sparse_launch
from kernels.common.launching import (
    bfloat16_as_float32,
    ceil_div,
    describable,
    dot_precision,
    on_device,
    padded_head_dim,
    strides,
    unit_stride,
)
from kernels.common.tiles import LIST_CHUNK
from kernels.common.tuning import program_count

# arguments that vary with the input's length: Triton shall not compile for their values
LENGTHS = ["n_queries", "n_keys", "n_tasks", "n_blocks", "first_block", "offset", "n_words", "capacity", "n_positions"]
LENGTHS += ["stride_gb", "stride_gh", "stride_gt"]


@triton.jit(do_not_specialize=LENGTHS)
def block_sparse_softmax(
    p_q, p_k, p_v, p_thresholds, p_given, p_slopes, p_list, p_bits, p_counter, p_out,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt,
    scale, heads, repeat, n_queries, n_keys, n_tasks, n_blocks, first_block, offset, n_words, capacity, n_positions,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr,
    TMA: tl.constexpr, LISTED: tl.constexpr, GIVEN: tl.constexpr, FUSED: tl.constexpr, STATS: tl.constexpr,
    PRECISION: tl.constexpr, SCAN_STAGES: tl.constexpr, STAGES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Programs take blocks of queries from a counter until none is left, long ones first within a head.

    LISTED, FUSED: the two designs of the gate, at most one of them; without both there is none. GIVEN: the list is of
    given blocks, the diagonal no exception. p_q, p_k, p_v: descriptors (if TMA). p_thresholds: float32 (H, n_positions)
    (if LISTED or FUSED, unless GIVEN). p_given: bytes (B, H, n_blocks, capacity), 1 or 0 (if GIVEN). p_list: int32
    (programs, capacity) (if LISTED). p_bits: int32 (B, H, n_blocks, n_words), zeros (if STATS). first_block: index, on
    the grid of positions, of the block of the first query. offset: position of query 0. Long, since a task's values
    stay in registers from load to store.
    """
    p_list += tl.program_id(0) * capacity
    task = tl.atomic_add(p_counter, 1)
    while task < n_tasks:
        i_bh, i_block = task // n_blocks, n_blocks - 1 - task % n_blocks
        i_batch, i_head = i_bh // heads, i_bh % heads
        i_group = i_head // repeat
        block_start = (first_block + i_block) * BM
        position = block_start + tl.arange(0, BM)
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
        if TMA:
            q = tl.reshape(p_q.load([i_batch, i_head, block_start - offset, 0]), (BM, BD))
            keys, values = p_k, p_v
        else:
            p_rows = p_q + i_batch.to(tl.int64) * stride_qb + i_head.to(tl.int64) * stride_qh
            q = tl.load(p_rows + row.to(tl.int64)[:, None] * stride_qt + dim[None, :], mask=mask, other=0.0)  # [BM, BD]
            keys = p_k + i_batch.to(tl.int64) * stride_kb + i_group.to(tl.int64) * stride_kh
            values = p_v + i_batch.to(tl.int64) * stride_vb + i_group.to(tl.int64) * stride_vh

        # blocks of keys: [0, before) and, unless causal, [after, hi) stand under the gate (if GIVEN all); all rows see
        # those up to `full` whole (the last query stands at the last key, so that this holds for all of [0, before))
        hi = (tl.maximum(tl.max(end, 0), 0) + BN - 1) // BN
        before = tl.minimum(tl.maximum(block_start, 0) // BN, hi)
        after = tl.minimum((tl.maximum(block_start + BM, 0) + BN - 1) // BN, hi)
        full = tl.maximum(n_keys // BN, after)
        limit = float("-inf")
        if (LISTED or FUSED) and not GIVEN:
            i_position = tl.minimum(tl.maximum(first_block + i_block, 0), n_positions - 1)
            limit = tl.load(p_thresholds + i_head * n_positions + i_position) / scale
        threshold = tl.where(inside, limit, float("inf"))
        p_words = p_bits
        if STATS:
            p_words += (i_bh.to(tl.int64) * n_blocks + i_block) * n_words
        n_full, n_kept = before, before
        if GIVEN:
            p_row = p_given + i_batch.to(tl.int64) * stride_gb + i_head.to(tl.int64) * stride_gh + i_block * stride_gt
            whole = before if CAUSAL else n_keys // BN
            n_full = list_given(p_list, p_row, 0, whole, 0, CHUNK)
            n_kept = list_given(p_list, p_row, whole, hi, n_full, CHUNK)
        elif LISTED:
            n_full, n_kept = list_off_diagonal(
                p_list, p_words, q, keys, i_batch, i_group, stride_kt, before, after, full, hi, threshold, limit, slope,
                first, end, position, n_keys, D, BD, BM, BN, CAUSAL, TMA, BIAS, STATS, PRECISION, SCAN_STAGES,
            )  # fmt: skip
        if LISTED:
            tl.debug_barrier()  # the whole program reads the list next

        out = tl.zeros([BM, BD], tl.float32)
        total = tl.zeros([BM], tl.float32)
        top = tl.full([BM], float("-inf"), tl.float32)
        exp2_scale = scale * 1.4426950408889634
        if not GIVEN:
            out, total, top = attend(
                q, keys, values, i_batch, i_group, stride_kt, stride_vt, p_list, p_words, before, after, out, total,
                top, exp2_scale, threshold, limit, slope, first, end, position, n_keys, D, BD, BM, BN, TMA, False,
                False, BIAS, True, False, PRECISION, 1 if FUSED else STAGES,
            )  # fmt: skip
        out, total, top = attend(
            q, keys, values, i_batch, i_group, stride_kt, stride_vt, p_list, p_words, 0, n_full, out, total, top,
            exp2_scale, threshold, limit, slope, first, end, position, n_keys, D, BD, BM, BN, TMA, LISTED, FUSED, BIAS,
            False, STATS, PRECISION, STAGES,
        )  # fmt: skip
        if GIVEN or not CAUSAL:
            if not LISTED:
                out, total, top = attend(
                    q, keys, values, i_batch, i_group, stride_kt, stride_vt, p_list, p_words, after, full, out, total,
                    top, exp2_scale, threshold, limit, slope, first, end, position, n_keys, D, BD, BM, BN, TMA, False,
                    FUSED, BIAS, False, STATS, PRECISION, STAGES,
                )  # fmt: skip
                n_full, n_kept = full, hi
            out, total, top = attend(
                q, keys, values, i_batch, i_group, stride_kt, stride_vt, p_list, p_words, n_full, n_kept, out, total,
                top, exp2_scale, threshold, limit, slope, first, end, position, n_keys, D, BD, BM, BN, TMA, LISTED,
                FUSED, BIAS, True, STATS, PRECISION, STAGES,
            )  # fmt: skip

        out = out / tl.where(total == 0, 1.0, total)[:, None]  # 0 for rows that see no kept key
        p_rows = p_out + i_batch.to(tl.int64) * stride_ob + i_head.to(tl.int64) * stride_oh
        pointers = p_rows + row.to(tl.int64)[:, None] * stride_ot + dim[None, :]
        tl.store(pointers, out.to(p_out.dtype.element_ty), mask=mask)
        if LISTED:
            tl.debug_barrier()  # the next task writes its list
        task = tl.atomic_add(p_counter, 1)


@bfloat16_as_float32(n_outputs=1)
def block_sparse_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thresholds: Tensor | None,
    blocks: Tensor | None,
    query_block: int,
    scale: float,
    causal: bool,
    alibi_slopes: Tensor | None,
    with_kept: bool,
) -> tuple[Tensor, Tensor | None]:
    """Arguments as in `block_sparse_softmax_attention`; nothing is checked here.

    Returns: out (B, H, Tq, D); kept as in BlockSparseStats, None unless with_kept. One launch, an argument a line.
    """
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    batch, heads, n_queries, head_dim = q.shape
    n_keys, offset = k.shape[2], k.shape[2] - n_queries
    out = torch.empty_like(q)
    kept = None
    if with_kept:
        kept = visible_blocks(n_queries, n_keys, causal, q.device, query_block).repeat(batch, heads, 1, 1)
        kept = kept if blocks is None else kept & blocks
    if out.numel() == 0 or n_keys == 0:
        return out.zero_(), kept
    n_blocks, n_key_blocks = grid_of_blocks(n_queries, n_keys, query_block)
    gated, padded_dim = thresholds is not None, padded_head_dim(head_dim)
    design = f"given_{query_block}" if blocks is not None else "gated" if gated else "ungated"
    descriptors = all(describable(x) for x in (q, k, v))
    launch = block_sparse_launch(design, padded_dim, q.dtype, q.device, descriptors)
    n_tasks, n_words = batch * heads * n_blocks, ceil_div(n_key_blocks, 32)
    n_programs = program_count(launch, q.device, n_tasks)
    fused, stats = gated and launch.fused, gated and with_kept
    listed = blocks is not None or (gated and not fused)
    bits = torch.zeros((batch, heads, n_blocks, n_words) if stats else 0, dtype=torch.int32, device=q.device)
    given = None if blocks is None else unit_stride(blocks).view(torch.uint8).expand(batch, heads, -1, -1)
    with on_device(q):
        block_sparse_softmax[(n_programs,)](
            p_q=_descriptor(q, query_block) if launch.descriptors else q,
            p_k=_descriptor(k, KEY_BLOCK) if launch.descriptors else k,
            p_v=_descriptor(v, KEY_BLOCK) if launch.descriptors else v,
            p_thresholds=None if thresholds is None else thresholds.contiguous(),
            p_given=given,
            p_slopes=None if alibi_slopes is None else alibi_slopes.float().contiguous(),
            p_list=torch.empty(n_programs * n_key_blocks if listed else 0, dtype=torch.int32, device=q.device),
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
            first_block=offset // query_block,
            offset=offset,
            n_words=n_words,
            capacity=n_key_blocks,
            n_positions=0 if thresholds is None else thresholds.shape[1],
            D=head_dim,
            BD=padded_dim,
            BM=query_block,
            BN=KEY_BLOCK,
            CAUSAL=causal,
            BIAS=alibi_slopes is not None,
            TMA=launch.descriptors,
            LISTED=listed,
            GIVEN=given is not None,
            FUSED=fused,
            STATS=stats,
            PRECISION=dot_precision(head_dim, q.dtype, q.device),
            SCAN_STAGES=launch.scan_stages,
            STAGES=launch.stages,
            CHUNK=LIST_CHUNK,
            **launch.options,
            **strides("q", q),
            **strides("k", k),
            **strides("v", v),
            **strides("o", out),
            **(dict(stride_gb=0, stride_gh=0, stride_gt=0) if given is None else strides("g", given)),
        )
    if stats and kept is not None:
        word = torch.arange(n_key_blocks, device=q.device)
        marked = ((bits[..., word // 32] >> (word % 32)) & 1).bool()[..., : kept.shape[3]]
        kept &= marked | diagonal_blocks(n_queries, n_keys, causal, q.device)
    return out, kept


def _descriptor(x: Tensor, n_rows: int) -> TensorDescriptor:
    """For blocks of n_rows of one head, padded in D."""
    return TensorDescriptor.from_tensor(x, [1, 1, n_rows, padded_head_dim(x.shape[3])])
