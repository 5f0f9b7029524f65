"""Scores with mean keys of blocks in PyTorch: their definition, as means of the scores of all keys."""

import torch
from torch import Tensor

from kernels.common.autocast import outside_autocast


@outside_autocast
def block_mean_scores_reference(
    q: Tensor,
    k: Tensor,
    first_key: Tensor,
    own_key: Tensor,
    block_size: int,
    n_blocks: int,
    scale: float,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """Arguments as in `block_mean_scores`; nothing is checked here. Differentiable as often as one likes."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    first, own = first_key[:, None, :, None].long(), own_key[:, None, :, None].long()  # [b, 1, n, 1]
    key, block = torch.arange(k.shape[2], device=q.device), torch.arange(n_blocks, device=q.device)
    seen = (first <= key) & (key <= own)
    grouped = q.to(dtype).unflatten(1, (k.shape[1], -1))  # [B, G, H / G, n, D]
    products = (grouped @ k.to(dtype)[:, :, None].mT).flatten(1, 2)  # [B, H, n, keys]
    inside = (key - first).div(block_size, rounding_mode="floor").clamp(0, n_blocks)
    inside = inside.where(seen, n_blocks).expand_as(products)  # behind the last block: what is not seen
    sums = products.new_zeros(*products.shape[:3], n_blocks + 1).scatter_add(-1, inside, products)[..., :-1]
    begin = first + block * block_size
    last = torch.minimum(begin + block_size - 1, own)  # [b, 1, n, C]
    scores = sums / (last - begin + 1).clamp(min=1) * scale
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(dtype)[:, None, None] * (own - last)
    return scores.masked_fill(begin > own, -torch.inf)
