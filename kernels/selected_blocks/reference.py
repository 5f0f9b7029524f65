"""Attention over selected blocks in PyTorch: its definition, by gathering the keys that each query reads."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.common.autocast import outside_autocast

GATHERED_ELEMENTS = 2**24  # of keys, and of values, gathered at once


@outside_autocast
def selected_blocks_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_key: Tensor,
    own_key: Tensor,
    block_size: int,
    scale: float,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """Arguments as in `selected_block_attention`; nothing is checked here. Differentiable as often as one likes; where
    gradients are wanted backward gathers again, a block of rows at a time."""
    batch, groups, n_queries, count = first_key.shape
    if q.numel() == 0 or k.shape[2] == 0 or count == 0:
        return q * 0 + (k.sum() + v.sum()) * 0  # zeros with gradients of zeros
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, v = k.to(dtype), v.to(dtype)  # before they are gathered: so their gradients are summed in float32
    rows = max(1, GATHERED_ELEMENTS // (batch * groups * count * block_size * q.shape[3]))
    parts = []
    for start in range(0, n_queries, rows):
        part = slice(start, start + rows)
        inputs = (q[:, :, part], k, v, first_key[:, :, part], own_key[:, part], block_size, scale, alibi_slopes)
        if torch.is_grad_enabled() and rows < n_queries:
            parts.append(checkpoint(_attend_rows, *inputs, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_attend_rows(*inputs))
    return torch.cat(parts, 2)


def _attend_rows(
    q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, own_key: Tensor, size: int, scale: float, slopes: Tensor | None
) -> Tensor:
    groups, n_keys, own = k.shape[1], k.shape[2], own_key[:, None, :, None]  # [b, 1, rows, 1]
    first = first_key[..., None].long()
    key = (first + torch.arange(size, device=q.device)).flatten(3)  # [B, G, rows, count * size]
    seen = ((first >= 0) & (key.view(*first.shape[:4], size) < n_keys)).flatten(3) & (key <= own)
    keys, values = (_rows_of(x, key.clamp(0, n_keys - 1)) for x in (k, v))
    grouped = q.to(k.dtype).unflatten(1, (groups, -1))  # [B, G, H / G, rows, D]
    scores = (grouped.unsqueeze(-2) @ keys.mT[:, :, None]).squeeze(-2) * scale
    if slopes is not None:
        scores = scores - slopes.to(k.dtype).view(groups, -1, 1, 1) * (own - key)[:, :, None]
    seen = seen[:, :, None]  # the same for the heads of a group
    any_seen = seen.any(-1, keepdim=True)
    scores = scores.masked_fill(~seen & any_seen, -torch.inf).masked_fill(~any_seen, 0)
    p = scores.softmax(-1) * any_seen  # rows that read nothing are 0
    return (p.unsqueeze(-2) @ values[:, :, None]).squeeze(-2).flatten(1, 2).to(q.dtype)


def _rows_of(x: Tensor, key: Tensor) -> Tensor:
    """x: (B, G, keys, D), key: (B, G, rows, n) -> (B, G, rows, n, D)."""
    batch = torch.arange(x.shape[0], device=x.device)[:, None, None, None]
    group = torch.arange(x.shape[1], device=x.device)[:, None, None]
    return x[batch, group, key]
