"""Importance of blocks in PyTorch: its definition, and the path of CPUs and of float64."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.common.autocast import outside_autocast


@outside_autocast
def block_importance_reference(
    q: Tensor,
    k: Tensor,
    first_key: Tensor,
    position: Tensor,
    compress_length: int,
    compress_stride: int,
    block_size: int,
    n_blocks: int,
    select_local: int | None,
    scale: float,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """Arguments as in `block_importance_scores`; nothing is checked here. Scores of all keys are in memory."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    groups = k.shape[1]
    grouped = q.to(dtype).unflatten(1, (groups, -1))  # [B, G, H / G, n, D]
    scores = grouped @ k[:, :, None].to(dtype).mT * scale  # [B, G, H / G, n, keys]
    number = torch.arange(k.shape[2], device=q.device) - first_key[:, None, None, :, None]
    distance = position[:, None, None, :, None] - (number * compress_stride + compress_length - 1)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(dtype).view(groups, -1, 1, 1) * distance
    visible = (number >= 0) & (distance >= 0)
    some = visible.any(-1, keepdim=True)
    scores = scores.masked_fill(~visible & some, -torch.inf)
    weights = torch.where(visible, scores.softmax(-1), 0).sum(2)  # [B, G, n, keys]; queries that see no key have none
    found = divide_among_blocks(weights, first_key, compress_length, compress_stride, block_size, n_blocks)
    return found if select_local is None else _mark_always_chosen(found, position, block_size, select_local)


def divide_among_blocks(
    weights: Tensor, first_key: Tensor, length: int, stride: int, block_size: int, n_blocks: int
) -> Tensor:
    """Equation 9 of arXiv:2502.11089 the right way round: block j gets the weights of all compressed keys that share
    tokens with it, times the number of strides they share (1 2 2 2 1 at 32, 16, 64).

    Args:
        weights: (B, G, n, keys), 0 for keys of other documents.

    Returns: (B, G, n, n_blocks).
    """
    before, count = length // stride - 1, (block_size + length) // stride - 1
    # tokens that block 0 shares with the compressed keys around it, of which the first begin before it
    starts = (torch.arange(count, device=weights.device) - before) * stride
    shared = ((starts + length).clamp(max=block_size) - starts.clamp(min=0)) // stride
    padded = pad(weights, (before, 1))  # behind `before` zeros; the last column is zero, for keys beyond
    around = torch.arange(max(n_blocks - 1, 0) * (block_size // stride) + count, device=weights.device)
    index = (first_key[..., None] + around).clamp(max=padded.shape[-1] - 1)  # [b, n, around]
    own = padded.gather(-1, index[:, None].expand(*weights.shape[:2], -1, -1))
    found: Tensor = (own.unfold(-1, count, block_size // stride) * shared).sum(-1)
    return found[..., :n_blocks]


def _mark_always_chosen(importance: Tensor, position: Tensor, block_size: int, select_local: int) -> Tensor:
    own = (position // block_size)[:, None, :, None]  # [b, 1, n, 1]
    block = torch.arange(importance.shape[3], device=importance.device)
    always = (block == 0) | (block > own - select_local)
    return importance.masked_fill(always, torch.inf).masked_fill(block > own, -torch.inf)
