"""Attention over selected blocks: the public function and its checks."""

import torch
from torch import Tensor

from kernels.alpha_entmax.attention import check_tensors, checked_scale
from kernels.block_sparse.attention import BACKENDS, unsupported
from kernels.common.arguments import check_block_size, check_integer, check_kind, check_positions, readable
from kernels.common.backends import choose_backend
from kernels.common.derivatives import refuse_transforms
from kernels.selected_blocks.operator import attention_operator
from kernels.selected_blocks.reference import selected_blocks_reference

REPEAT_MAX = 128  # query heads of a group that one tile of the kernels takes


def selected_block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_key: Tensor,
    own_key: Tensor,
    *,
    block_size: int,
    n_blocks: int | None = None,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention of each query over blocks of keys that it has selected, and no others: the selection branch of
    Native Sparse Attention (arXiv:2502.11089, equation 10 and section 3.4). Forward and backward; selecting itself has
    no gradient. The same inputs give the same bits.

    Args:
        q: (B, H, n, D), float64, float32, bfloat16 or float16.
        k, v: (B, G, keys, D), dtype and device of q, H a multiple of G (grouped-query heads).
        first_key: int32 (B, G, n, count) on q's device, the index of the first key of each block that a query reads,
            the same for the H / G query heads of a group; -1 for none. A key in two blocks of one query counts twice.
        own_key: int32 or int64 (B or 1, n), the last key that each query sees: of a block's keys it reads those up to
            here. Causality, and packed documents apart where blocks begin at documents' starts.
        block_size: tokens of a block. The last block may reach beyond the keys.
        n_blocks: upper bound of the number of different blocks that a batch row and group has in first_key. None:
            keys / block_size, rounded up, which holds where blocks begin at multiples of block_size; with packed
            documents, where blocks begin anew, it is keys // block_size plus the number of documents. Memory grows with
            it: backward holds 8 bytes for each of n_blocks * block_size * D.
        scale: positive, multiplies the scores; None is D ** -0.5.
        alibi_slopes: (H,) non-negative; adds -slope * (own_key - key) to the scaled scores.
        backend: "triton" (CUDA, or CPU tensors under TRITON_INTERPRET=1; not float64, head dims to 256, in float32 to
            128), "torch" or "auto": triton on CUDA where it can, else torch.

    Returns: (B, H, n, D) in q's dtype. A row that reads no key is 0, and so are its gradients.

    Raises: TypeError or ValueError naming the argument, its value and what was expected; values of tensors are read on
    the CPU only. There more blocks than n_blocks are refused; on CUDA they end in a device-side assertion.
    """
    check_tensors(q, k, v)
    check_block_size(block_size)
    if n_blocks is None:
        n_blocks = -(-k.shape[2] // block_size)
    check_integer("n_blocks", n_blocks)
    _check_blocks(q, k, first_key, own_key, n_blocks)
    scale = checked_scale(q, scale, alibi_slopes)
    lacking = unsupported(q)
    if q.shape[1] // k.shape[1] > REPEAT_MAX:
        lacking = f"takes up to {REPEAT_MAX} query heads for each key head, got {q.shape[1]} and {k.shape[1]}"
    if choose_backend(backend, BACKENDS, q, lacking) == "torch":
        return selected_blocks_reference(q, k, v, first_key, own_key, block_size, scale, alibi_slopes)
    refuse_transforms("selected_block_attention by backend 'triton'", "take backend='torch'", q, k, v)
    out, _ = attention_operator(q, k, v, first_key, own_key, alibi_slopes, block_size, n_blocks, scale)
    return out


def _check_blocks(q: Tensor, k: Tensor, first_key: Tensor, own_key: Tensor, n_blocks: int) -> None:
    (batch, _, n_queries, _), groups, n_keys = q.shape, k.shape[1], k.shape[2]
    check_kind("first_key", first_key, (torch.int32,), q.device)
    check_positions("own_key", own_key, batch, n_queries, q.device)
    if first_key.dim() != 4 or first_key.shape[:3] != (batch, groups, n_queries):
        raise ValueError(
            f"first_key must be ({batch}, {groups}, {n_queries}, count): blocks of each batch row, key head and query, "
            f"got {tuple(first_key.shape)}"
        )
    if not readable(q) or first_key.numel() == 0:
        return
    least, most = int(first_key.min()), int(first_key.max())
    if least < -1 or most >= max(n_keys, 0):
        raise ValueError(
            f"first_key must lie in 0 ... {n_keys - 1}, or be -1 for no block, got {least if least < -1 else most}"
        )
    if n_blocks < n_keys:
        found = max(int((row.unique() >= 0).sum()) for row in first_key.flatten(0, 1))
        if found > n_blocks:
            raise ValueError(
                f"n_blocks must be at least the number of different blocks in a batch row and group, {found}, got "
                f"{n_blocks}"
            )
