"""Scores with mean keys of blocks: the public function and its checks."""

import torch
from torch import Tensor

from kernels.alpha_entmax.attention import check_tensors, checked_scale
from kernels.block_means.operator import scores_operator
from kernels.block_means.reference import block_mean_scores_reference
from kernels.block_sparse.attention import BACKENDS, unsupported
from kernels.common.arguments import (
    check_block_size,
    check_integer,
    check_kind,
    check_positions,
    check_seen,
    check_tensor,
    readable,
)
from kernels.common.backends import choose_backend
from kernels.common.derivatives import refuse_transforms


def block_mean_scores(
    q: Tensor,
    k: Tensor,
    first_key: Tensor,
    own_key: Tensor,
    block_start: Tensor,
    block_ends: Tensor,
    *,
    block_size: int,
    n_blocks: int,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Scores of queries with summaries of blocks, the mean of a block's keys (as arXiv:2605.18753 pools them); of a
    query's own block as far as it sees it. Forward and backward, in q and k. The same inputs give the same bits.

        out[i, c] = scale q_i . mean_j(k_j) - slope (own_i - last(j)),    first_i + c block_size <= j <= own_i,
        j < first_i + (c + 1) block_size

    Args:
        q: (B, H, n, D), float64, float32, bfloat16 or float16.
        k: (B, G, keys, D), on q's device, of its dtype or float32, H a multiple of G (grouped-query heads).
        first_key: int32 or int64 (B or 1, n), the first key of each query's document.
        own_key: as first_key, the last key that each query sees; before first_key where it sees none. No two queries of
            a row share one where gradients in k are wanted.
        block_start: int32 (keys,), the first key of each key's block. Blocks begin anew with each document.
        block_ends: int32 (F,), the last key of each full block, -1 for none; for gradients in k.
        block_size: keys of a block. n_blocks: C, those of the longest document.
        scale: positive, multiplies the products; None is D ** -0.5.
        alibi_slopes: (H,) non-negative; adds -slope * (own_key - last key of the block that the query sees).
        backend: "triton" (CUDA, or CPU tensors under TRITON_INTERPRET=1; not float64, head dims to 256, in float32 to
            128), "torch" or "auto": triton on CUDA where it can, else torch, which computes the scores of all keys.

    Returns: float32 (float64 for float64 q) (B, H, n, C), -inf for blocks behind a query's own. What is not finite in a
        key makes NaN of the blocks' scores in which it is seen, and of the gradients of their queries, alone.

    Raises: TypeError or ValueError naming the argument, its value and what was expected.
    """
    check_tensor("k", k)
    like_k = q.new_empty(()).expand(k.shape)
    check_tensors(q, like_k, like_k)
    check_kind("k", k, tuple(dict.fromkeys((q.dtype, torch.float32))), q.device)
    check_block_size(block_size)
    check_integer("n_blocks", n_blocks)
    if n_blocks < 0:
        raise ValueError(f"n_blocks must be at least 0, got {n_blocks}")
    (batch, _, n_queries, _), n_keys = q.shape, k.shape[2]
    for name, x in (("first_key", first_key), ("own_key", own_key)):
        check_positions(name, x, batch, n_queries, q.device)
    check_seen(first_key, own_key, n_keys)
    for name, x in (("block_start", block_start), ("block_ends", block_ends)):
        check_kind(name, x, (torch.int32,), q.device)
        if x.dim() != 1 or (name == "block_start" and len(x) != n_keys):
            raise ValueError(f"block_start must be ({n_keys},) and block_ends (F,), got {name} {tuple(x.shape)}")
        if readable(x) and x.numel() and not -1 <= int(x.min()) <= int(x.max()) < max(n_keys, 1):
            raise ValueError(f"{name} must lie in -1 ... {n_keys - 1}, got {int(x.min())} ... {int(x.max())}")
    scale = checked_scale(q, scale, alibi_slopes)
    if choose_backend(backend, BACKENDS, q, unsupported(q)) == "torch":
        return block_mean_scores_reference(q, k, first_key, own_key, block_size, n_blocks, scale, alibi_slopes)
    refuse_transforms("block_mean_scores by backend 'triton'", "take backend='torch'", q, k)
    return scores_operator(
        q, k, first_key, own_key, block_start, block_ends, alibi_slopes, block_size, n_blocks, scale
    )  # fmt: skip
