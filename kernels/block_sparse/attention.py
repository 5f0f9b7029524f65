"""Block-Sparse FlashAttention (Ohayon et al. 2025, arXiv:2512.07011): the public function, what it kept, its checks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.alpha_entmax.attention import check_tensors, checked_scale, unsupported_by_triton
from kernels.block_sparse.operator import block_sparse_triton
from kernels.block_sparse.reference import (
    KEY_BLOCK,
    QUERY_BLOCK,
    QUERY_BLOCKS,
    block_sparse_reference,
    grid_of_blocks,
    visible_blocks,
)
from kernels.block_sparse.tuning import widest_head_dim
from kernels.common.arguments import check_flag, check_tensor, readable
from kernels.common.backends import choose_backend
from kernels.common.derivatives import refuse_transforms

BACKENDS = ("auto", "triton", "torch")
FLOAT32_HEAD_DIM = 128  # the largest that the Triton kernel takes in float32


@dataclass(frozen=True)
class BlockSparseStats:
    """kept: bool (B, H, query blocks, key blocks), those that were read; under thresholds the diagonal ones included.
    visible: bool (query blocks, key blocks), blocks in which some query sees some key."""

    kept: Tensor
    visible: Tensor

    @property
    def density(self) -> Tensor:
        """float32 (B, H): kept blocks over visible ones."""
        return self.kept.sum((2, 3)) / self.visible.sum().clamp(min=1)


def block_sparse_softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    thresholds: Tensor | None = None,
    blocks: Tensor | None = None,
    query_block: int = QUERY_BLOCK,
    scale: float | None = None,
    causal: bool = True,
    alibi_slopes: Tensor | None = None,
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, BlockSparseStats]:
    """Softmax attention over the blocks of keys that hold a score above a threshold (arXiv:2512.07011): all scores are
    computed, but of the other blocks neither exponentials nor values. Or over given blocks of keys: nothing is computed
    of the others. Dense without either. Inference only.

    Args:
        q: (B, H, Tq, D), float64, float32, bfloat16 or float16. The last query stands at the last key.
        k, v: (B, G, Tk, D), dtype and device of q, H a multiple of G (grouped-query heads).
        thresholds: float32 (H, P) on q's device: [h, i] is that of head h for queries at positions 128 i ... 128 i +
            127, the last one also that of all later positions. A block of 64 keys is kept where one of its scores
            (scaled, with bias) exceeds it; blocks with keys at those positions are always kept. -inf keeps all. A
            chunk of a longer sequence decides as the whole does where it starts at a multiple of 128.
        blocks: bool (B or 1, H or 1, query blocks, key blocks) on q's device, not with thresholds: [b, h, i, j] says
            whether queries of block i read block j of 64 keys. A block of queries has those at positions query_block *
            n ... query_block * (n + 1) - 1, block 0 those of query 0's n = (Tk - Tq) // query_block. No block is kept
            that is not given, the diagonal no more than others; what a query does not see, it does not read.
        query_block: 128 or 64, of blocks; thresholds have 128.
        scale: positive, multiplies the scores; None is D ** -0.5.
        causal: a query sees no later key.
        alibi_slopes: (H,) non-negative; adds -slope * (query position - key position) to the scaled scores.
        backend: "triton" (CUDA, or CPU tensors under TRITON_INTERPRET=1; not float64, head dims to 256, in
            float32 to 128), "torch" or "auto": triton on CUDA where it can, else torch.
        return_stats: also return a BlockSparseStats.

    Returns: (B, H, Tq, D) in q's dtype; with return_stats a pair (output, BlockSparseStats). A row that sees no kept
    key is 0. A NaN score keeps its block and spoils its row.

    Raises: TypeError or ValueError naming the argument, its value and what was expected (values of thresholds and
    slopes are read on the CPU only); RuntimeError where a gradient is asked for.
    """
    check_tensors(q, k, v)
    check_flag("causal", causal)
    check_flag("return_stats", return_stats)
    _check_gate(q, k, thresholds, blocks, query_block)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise RuntimeError("block_sparse_softmax_attention has no backward pass: call it under torch.no_grad()")
    scale = checked_scale(q, scale, alibi_slopes)
    backend = choose_backend(backend, BACKENDS, q, unsupported(q))
    if backend == "triton":
        refuse_transforms("block_sparse_softmax_attention by backend 'triton'", "take backend='torch'", q, k, v)
        out, kept = block_sparse_triton(
            q, k, v, thresholds, blocks, query_block, scale, causal, alibi_slopes, return_stats
        )
    else:
        out, kept = block_sparse_reference(q, k, v, thresholds, blocks, query_block, scale, causal, alibi_slopes)
    if not return_stats:
        return out
    assert kept is not None
    return out, BlockSparseStats(kept, visible_blocks(q.shape[2], k.shape[2], causal, q.device, query_block))


def runs_on_triton(q: Tensor) -> bool:
    """Whether backend "auto" takes the Triton kernel for q (B, H, Tq, D)."""
    return choose_backend("auto", BACKENDS, q, unsupported(q)) == "triton"


def _check_gate(q: Tensor, k: Tensor, thresholds: Tensor | None, blocks: Tensor | None, query_block: int) -> None:
    batch, heads, n_queries, _ = q.shape
    if query_block not in (QUERY_BLOCKS if blocks is not None else (QUERY_BLOCK,)):
        raise ValueError(
            f"query_block must be one of {QUERY_BLOCKS} with blocks and {QUERY_BLOCK} without, got {query_block}"
        )
    if thresholds is not None:
        check_tensor("thresholds", thresholds)
        if blocks is not None:
            raise ValueError("got thresholds and blocks: blocks say themselves what is kept, leave thresholds out")
        if thresholds.dim() != 2 or thresholds.shape[0] != heads or thresholds.shape[1] < 1:
            raise ValueError(
                f"thresholds must be ({heads}, P): a row for each query head and a column for each block of query "
                f"positions, got {tuple(thresholds.shape)}"
            )
        if thresholds.dtype != torch.float32 or thresholds.device != q.device:
            raise ValueError(f"thresholds must be float32 on {q.device}, got {thresholds.dtype} on {thresholds.device}")
        if readable(thresholds) and bool(thresholds.isnan().any()):
            raise ValueError("thresholds must be numbers or infinite, got NaN")
    if blocks is not None:
        check_tensor("blocks", blocks)
        grid = grid_of_blocks(n_queries, k.shape[2], query_block)
        if blocks.dim() != 4 or blocks.shape[0] not in (1, batch) or blocks.shape[1] not in (1, heads):
            raise ValueError(f"blocks must be ({batch} or 1, {heads} or 1, *{grid}), got {tuple(blocks.shape)}")
        if blocks.shape[2:] != grid:
            raise ValueError(
                f"blocks must end in {grid}: blocks of {query_block} query positions (the last query stands at the "
                f"last key) and of {KEY_BLOCK} keys, got {tuple(blocks.shape)}"
            )
        if blocks.dtype != torch.bool or blocks.device != q.device:
            raise ValueError(f"blocks must be bool on {q.device}, got {blocks.dtype} on {blocks.device}")


def unsupported(q: Tensor) -> str | None:
    """What kernels of blocks cannot do for q (B, H, Tq, D), None where they can. 128 queries of float32 beside a block
    of keys and one of values: wider heads would not fit in shared memory."""
    if q.dtype == torch.float32 and q.shape[3] > FLOAT32_HEAD_DIM:
        return f"takes float32 with head dims up to {FLOAT32_HEAD_DIM}, got {q.shape[3]}"
    return unsupported_by_triton(q.dtype, q.shape[3], q.device, widest_head_dim)
