"""Attention with a bias for each block in PyTorch: its definition, with all scores of some queries at a time."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.common.autocast import outside_autocast

SCORES = 2**24  # held at once


@outside_autocast
def block_bias_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    first_key: Tensor,
    own_key: Tensor,
    block_size: int,
    scale: float,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """Arguments as in `block_bias_attention`; nothing is checked here. Differentiable as often as one likes; where
    gradients are wanted backward computes scores again, of a block of queries at a time."""
    if q.numel() == 0 or k.shape[2] == 0 or bias.shape[3] == 0:
        return q * 0 + (k.sum() + v.sum()) * 0 + bias.new_zeros(()) * bias[..., :0].sum()  # with gradients of zeros
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = k.to(wide), v.to(wide)
    rows = max(1, SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    parts = []
    for start in range(0, q.shape[2], rows):
        part = slice(start, start + rows)
        inputs = (q[:, :, part], k, v, bias[:, :, part], first_key[:, part], own_key[:, part])
        if torch.is_grad_enabled() and rows < q.shape[2]:
            more = (block_size, scale, alibi_slopes)
            parts.append(checkpoint(_attend_rows, *inputs, *more, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_attend_rows(*inputs, block_size, scale, alibi_slopes))
    return torch.cat(parts, 2)


def _attend_rows(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, first_key: Tensor, own_key: Tensor, size: int, scale: float,
    slopes: Tensor | None,
) -> Tensor:  # fmt: skip
    first, own = first_key[:, None, :, None].long(), own_key[:, None, :, None].long()  # [b, 1, rows, 1]
    key = torch.arange(k.shape[2], device=q.device)
    seen = (first <= key) & (key <= own)  # [b, 1, rows, keys]
    block = ((key - first) // size).clamp(0, bias.shape[3] - 1).expand(*bias.shape[:3], -1)
    added = bias.gather(-1, block)  # [B, H, rows, keys]
    if slopes is not None:
        added = added - slopes.to(added.dtype)[:, None, None] * (own - key)
    read = seen & (added.detach() != -torch.inf)
    some = read.any(-1, keepdim=True)
    used = read.unflatten(1, (k.shape[1], -1)).any((2, 3))[..., None]  # [B, G, keys, 1]
    k, v = k.where(used, 0), v.where(used, 0)  # weight 0 would let NaN of unread keys pass
    grouped = q.to(k.dtype).unflatten(1, (k.shape[1], -1))  # [B, G, H / G, rows, D]
    scores = (grouped @ k[:, :, None].mT).flatten(1, 2) * scale
    scores = (scores + added.where(read, 0)).masked_fill(~read & some, -torch.inf)
    p = scores.masked_fill(~some, 0).softmax(-1) * some  # rows that read nothing are 0
    return (p.unflatten(1, (k.shape[1], -1)) @ v[:, :, None]).flatten(1, 2).to(q.dtype)
