"""Attention with a bias for each block: the public function and its checks."""

import torch
from torch import Tensor

from kernels.alpha_entmax.attention import check_tensors, checked_scale
from kernels.block_bias.operator import attention_operator
from kernels.block_bias.reference import block_bias_reference
from kernels.block_sparse.attention import BACKENDS, unsupported
from kernels.common.arguments import check_block_size, check_kind, check_positions, check_seen, readable
from kernels.common.backends import choose_backend
from kernels.common.derivatives import refuse_transforms


def block_bias_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    first_key: Tensor,
    own_key: Tensor,
    *,
    block_size: int,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention whose scores have a bias for each query, head and block of keys, such as the logarithm of the
    block's weight in DashAttention (arXiv:2605.18753); blocks of bias -inf are not read. Forward and backward, in q, k,
    v and bias. The same inputs give the same bits.

        out_i = sum_j softmax_j(scale q_i . k_j + bias[i, c(j)] - slope (own_i - j)) v_j
        first_i <= j <= own_i,    c(j) = (j - first_i) // block_size

    Args:
        q: (B, H, n, D), float64, float32, bfloat16 or float16.
        k, v: (B, G, keys, D), dtype and device of q, H a multiple of G (grouped-query heads).
        bias: (B, H, n, C) on q's device, float32 (float64 for float64 q), C blocks counted from first_key; what stands
            behind a query's own block is not read. Blocks are left out by -inf, not by the least float32: where all
            biases of a row are large, the kernels' gradients are off by EPS times their size, and beyond scale * 3e38
            the row is NaN.
        first_key: int32 or int64 (B or 1, n), the first key of each query's document.
        own_key: as first_key, the last key that each query sees, in one of its C blocks; one before first_key where it
            sees none.
        block_size: keys of a block.
        scale: positive, multiplies the products; None is D ** -0.5.
        alibi_slopes: (H,) non-negative; adds -slope * (own_key - key).
        backend: "triton" (CUDA, or CPU tensors under TRITON_INTERPRET=1; not float64, head dims to 256, in float32 to
            128), "torch" or "auto": triton on CUDA where it can, else torch.

    Returns: (B, H, n, D) in q's dtype. A row that reads no key is 0, and so are its gradients; the gradient of a bias
    of -inf is 0. A row whose scores overflow to infinity, or all to -infinity, is NaN, as in torch's softmax.

    Raises: TypeError or ValueError naming the argument, its value and what was expected; values of tensors are read on
    the CPU only.
    """
    check_tensors(q, k, v)
    check_block_size(block_size)
    _check_blocks(q, k, bias, first_key, own_key, block_size)
    scale = checked_scale(q, scale, alibi_slopes)
    if choose_backend(backend, BACKENDS, q, unsupported(q)) == "torch":
        return block_bias_reference(q, k, v, bias, first_key, own_key, block_size, scale, alibi_slopes)
    refuse_transforms("block_bias_attention by backend 'triton'", "take backend='torch'", q, k, v, bias)
    out, _ = attention_operator(q, k, v, bias, first_key, own_key, alibi_slopes, block_size, scale)
    return out


def _check_blocks(q: Tensor, k: Tensor, bias: Tensor, first_key: Tensor, own_key: Tensor, block_size: int) -> None:
    (batch, heads, n_queries, _), n_keys = q.shape, k.shape[2]
    check_kind("bias", bias, (torch.float64 if q.dtype == torch.float64 else torch.float32,), q.device)
    if bias.dim() != 4 or bias.shape[:3] != (batch, heads, n_queries):
        raise ValueError(
            f"bias must be ({batch}, {heads}, {n_queries}, C): one of each query, head and block, got "
            f"{tuple(bias.shape)}"
        )
    for name, x in (("first_key", first_key), ("own_key", own_key)):
        check_positions(name, x, batch, n_queries, q.device)
    check_seen(first_key, own_key, n_keys)
    if not readable(q) or n_queries == 0:
        return
    most = int((own_key - first_key).max()) // block_size
    if most >= bias.shape[3]:
        raise ValueError(
            f"bias must have a column for each block of {block_size} keys up to a query's own, {most + 1}, got "
            f"{bias.shape[3]}"
        )
