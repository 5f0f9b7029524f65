"""Importance of blocks: the public function and its checks."""

import torch
from torch import Tensor

from kernels.alpha_entmax.attention import check_tensors, checked_scale
from kernels.block_importance.operator import importance_operator
from kernels.block_importance.reference import block_importance_reference
from kernels.block_sparse.attention import BACKENDS, unsupported
from kernels.common.arguments import LARGEST_BLOCK, check_integer, check_positions, readable
from kernels.common.backends import choose_backend


@torch.no_grad()
def block_importance_scores(
    q: Tensor,
    k: Tensor,
    first_key: Tensor,
    position: Tensor,
    *,
    compress_length: int,
    compress_stride: int,
    block_size: int,
    n_blocks: int,
    select_local: int | None = None,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """How much each query's attention to compressed keys falls into each block of tokens of its document (equations 8
    to 10 of arXiv:2502.11089). Without gradient, since choosing has none. The same inputs give the same bits.

    Compressed key m of a document stands for its tokens m compress_stride ... m compress_stride + compress_length - 1,
    and is seen from the last of them on. Its weight goes to each block as often as it has whole strides there:

        importance[i, j] = sum_h,m softmax_m(scale q_hi . k_m - slope_h (position_i - last token of m)) strides(m, j)

    over the query heads h of a key head, and over the keys m that query i sees.

    Args:
        q: (B, H, n, D), float64, float32, bfloat16 or float16.
        k: (B, G, keys, D), compressed keys, those of several documents one behind the other; dtype and device of q, H a
            multiple of G (grouped-query heads).
        first_key: int32 or int64 (B or 1, n), the first compressed key of each query's document, or where it would
            stand.
        position: as first_key, each query's token in its document. All keys that it sees are there.
        compress_length, block_size: tokens, multiples of compress_stride.
        n_blocks: C, those of the longest document.
        select_local: None, or how many blocks up to a query's own are chosen always. Their importance, and that of the
            first block, is then inf, and that of blocks behind its own -inf.
        scale: positive, multiplies the products; None is D ** -0.5.
        alibi_slopes: (H,) non-negative.
        backend: "triton" (CUDA, or CPU tensors under TRITON_INTERPRET=1; not float64, head dims to 256, in float32 to
            128), "torch" or "auto": triton on CUDA where it can, else torch, which holds the scores of all keys.

    Returns: float32 (float64 for float64 q) (B, G, n, C); 0 for blocks that no key lies in which the query sees. The
        other blocks of a query are NaN if a score is NaN or +inf, or all are -inf, as in torch's softmax.

    Raises: TypeError or ValueError naming the argument, its value and what was expected; values of tensors are read on
    the CPU only.
    """
    check_tensors(q, k, k)
    _check_sizes(compress_length, compress_stride, block_size, n_blocks, select_local)
    for name, x in (("first_key", first_key), ("position", position)):
        check_positions(name, x, q.shape[0], q.shape[2], q.device)
        if readable(x) and x.numel() and int(x.min()) < 0:
            raise ValueError(f"{name} must be at least 0, got {int(x.min())}")
    if readable(position) and position.numel():
        seen = ((position + 1 - compress_length) // compress_stride + 1).clamp(min=0)
        if (end := int((first_key + seen).where(seen > 0, 0).max())) > k.shape[2]:
            raise ValueError(
                f"first_key and position must leave all keys that a query sees below the number of keys, {k.shape[2]}, "
                f"got key {end - 1}"
            )
    scale = checked_scale(q, scale, alibi_slopes)
    sizes = (compress_length, compress_stride, block_size, n_blocks, select_local, scale)
    if choose_backend(backend, BACKENDS, q, unsupported(q)) == "torch":
        return block_importance_reference(q, k, first_key, position, *sizes, alibi_slopes)
    found: Tensor = importance_operator(q, k, first_key, position, alibi_slopes, *sizes)
    return found


def _check_sizes(length: int, stride: int, block_size: int, n_blocks: int, select_local: int | None) -> None:
    for name, value in (("compress_stride", stride), ("compress_length", length), ("block_size", block_size)):
        check_integer(name, value)
        if not 1 <= value <= LARGEST_BLOCK:
            raise ValueError(f"{name} must lie in 1 ... {LARGEST_BLOCK}, got {value}")
        if value % stride:
            raise ValueError(f"{name} must be a multiple of compress_stride, {stride}, got {value}")
    _check_least("n_blocks", n_blocks, 0)
    if select_local is not None:
        _check_least("select_local", select_local, 1)


def _check_least(name: str, value: int, least: int) -> None:
    check_integer(name, value)
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
