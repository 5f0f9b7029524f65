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
    inside = (key - first).div(block_size, rounding_mode="floor").clamp(0, n_blocks)
    inside = inside.where(seen, n_blocks)  # behind the last block: what is not seen

    def by_block(x: Tensor) -> Tensor:  # [B, heads, n, keys] -> sums [B, heads, n, C]
        sums = x.new_zeros(*x.shape[:3], n_blocks + 1)
        return sums.scatter_add(-1, inside.expand_as(x), x)[..., :-1]

    # gradients that are 0 would let NaN of unseen keys and queries pass: products go without, and get it by block
    q, k = q.to(dtype), k.to(dtype)
    good_q, good_k = (x.isfinite().all(-1, keepdim=True) for x in (q, k))
    grouped = q.where(good_q, 0).unflatten(1, (k.shape[1], -1))  # [B, G, H / G, n, D]
    products = (grouped @ k.where(good_k, 0)[:, :, None].mT).flatten(1, 2)  # [B, H, n, keys]
    spoilt = by_block((~good_k).mT.expand(-1, -1, q.shape[2], -1).to(dtype)) > 0  # [B, G, n, C]
    spoilt = torch.where(spoilt, torch.nan, 0.0).to(dtype).repeat_interleave(q.shape[1] // k.shape[1], 1)
    begin = first + block * block_size
    last = torch.minimum(begin + block_size - 1, own)  # [b, 1, n, C]
    scores = by_block(products) / (last - begin + 1).clamp(min=1) * scale * torch.where(good_q, 1.0, torch.nan)
    scores = scores + spoilt * q.sum(-1, keepdim=True)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(dtype)[:, None, None] * (own - last)
    return scores.masked_fill(begin > own, -torch.inf)
