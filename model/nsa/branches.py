"""Attention of one branch: FlexAttention on CUDA, else torch's attention with masks, for as many queries at a time as
keep these small."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from model.nsa.blocks import Blocks, Visible
from model.nsa.selection import Selection
from model.softmax import FLEX_SCORES, MASK_ELEMENTS, compiled_flex

TILE = 128  # of FlexAttention's block masks, queries and keys


@dataclass(frozen=True)
class Branch:
    """What one branch lets queries see, and its ALiBi.

    visible: of Blocks. distance: (b, i, j) -> tokens, of Blocks. slopes: float32 (H,) or None. first_key, last_key:
    int64 (b or 1, n), the keys from and up to which each query may see some.
    """

    visible: Visible
    distance: Callable[[Tensor, Tensor, Tensor], Tensor]
    slopes: Tensor | None
    first_key: Tensor
    last_key: Tensor


def compression_branch(blocks: Blocks, slopes: Tensor | None) -> Branch:
    first = blocks.first_block.expand_as(blocks.position)
    last = (first + blocks.position // blocks.config.compress_stride).clamp(max=len(blocks.first_key) - 1)
    return Branch(blocks.sees_compressed(), blocks.distance(blocks.last_position), slopes, first, last)


def selection_branch(blocks: Blocks, slopes: Tensor | None, selected: Tensor, heads_per_group: int) -> Branch:
    first, visible = blocks.own_key - blocks.position, blocks.sees_selected(selected, heads_per_group)
    return Branch(visible, blocks.distance(blocks.key_position), slopes, first, blocks.own_key)


def window_branch(blocks: Blocks, slopes: Tensor | None) -> Branch:
    first = blocks.own_key - blocks.position.clamp(max=blocks.config.window - 1)
    return Branch(blocks.sees_window(), blocks.distance(blocks.key_position), slopes, first, blocks.own_key)


def attend_masked(q: Tensor, k: Tensor, v: Tensor, branch: Branch) -> Tensor:
    """Softmax attention over what is visible; 0 for queries that see nothing. q: (B, H, n, D), k and v:
    (B, G, keys, D). Where gradients are wanted and one block of rows does not hold all, backward computes each block's
    weights again."""
    rows = max(16, MASK_ELEMENTS // (q.shape[0] * q.shape[1] * k.shape[2]))
    parts = [slice(start, min(start + rows, q.shape[2])) for start in range(0, q.shape[2], rows)]
    if len(parts) == 1 or not torch.is_grad_enabled():
        return torch.cat([_attend_rows(q, k, v, branch, part) for part in parts], dim=2)
    again: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.cat([checkpoint(_attend_rows, q, k, v, branch, part, **again) for part in parts], dim=2)


def _attend_rows(q: Tensor, k: Tensor, v: Tensor, branch: Branch, rows: slice) -> Tensor:
    """rows: of the queries that are attended with."""
    keys = slice(0, k.shape[2])
    if not q.is_cuda:  # where it would wait for the device
        keys = slice(int(branch.first_key[:, rows].min()), int(branch.last_key[:, rows].max()) + 1)
    query, key = (torch.arange(one.start, one.stop, device=q.device) for one in (rows, keys))
    mask, bias = mask_and_bias(branch, (q.shape[0], q.shape[1]), query, key)
    seen = mask.any(-1, keepdim=True)
    mask = mask | ~seen  # weights of no key would be 0 / 0
    if bias is not None:
        mask = bias.masked_fill(~mask, -torch.inf).to(q.dtype)
    out = scaled_dot_product_attention(
        q[:, :, rows], k[:, :, keys], v[:, :, keys], attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out * seen


def mask_and_bias(branch: Branch, heads: tuple[int, int], rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor | None]:
    """What is visible, bool, and what ALiBi adds to scores, float32 or None; both (B or 1, H or 1, rows, keys). heads:
    B and H. rows, keys: int64, indices."""
    b, h = (torch.arange(size, device=rows.device) for size in heads)
    b, h, i = b[:, None, None, None], h[:, None, None], rows[:, None]
    mask = branch.visible(b, h, i, keys)
    mask = mask.view(*(1,) * (4 - mask.dim()), *mask.shape)
    if branch.slopes is None:
        return mask, None
    return mask, -branch.slopes[h] * branch.distance(b, i, keys)


def uses_flex(device: torch.device, n_queries: int, n_keys: int) -> bool:
    """Whether branches are attended by `attend_flex`: fewer scores take less than compiling it."""
    return device.type == "cuda" and n_queries > 1 and n_queries * n_keys > FLEX_SCORES


def attend_flex(q: Tensor, k: Tensor, v: Tensor, branch: Branch, block_mask: BlockMask) -> Tensor:
    """As attend_masked, by FlexAttention, which skips tiles that block_mask leaves out."""
    slopes, distance = branch.slopes, branch.distance

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert slopes is not None
        return score - slopes[h] * distance(b, i, j)

    out: Tensor = compiled_flex()(
        q, k, v, score_mod=None if slopes is None else score_mod, block_mask=block_mask,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out


def shared_block_mask(visible: Visible, rows: int, n_queries: int, n_keys: int, device: torch.device) -> BlockMask:
    """Of a branch that is alike in all heads and layers. rows: B where queries stand elsewhere in each row, else 1."""
    compiled = device.type == "cuda"
    return create_block_mask(visible, rows, None, n_queries, n_keys, device=device, BLOCK_SIZE=TILE, _compile=compiled)


def selected_block_mask(visible: Visible, selection: Selection, blocks: Blocks, heads_per_group: int) -> BlockMask:
    """Of the selection branch: the tiles that hold a token which any query of the tile has selected. A tile's queries
    read what any of them selects, and masks hide the rest: more keys than by the paper's kernel, which takes one query
    of all heads of a group at a time."""
    index, n_keys, size = selection.blocks, blocks.n_keys, blocks.config.select_block
    batch, groups, n_queries, count = index.shape
    tiles, key_tiles = -(-n_queries // TILE), -(-n_keys // TILE)
    start = (blocks.own_key - blocks.position)[:, None, :, None] + index * size  # first token of each selected block
    last = torch.minimum(start + size - 1, blocks.own_key[:, None, :, None]) // TILE
    tile = torch.arange(n_queries, device=index.device)[:, None] // TILE * key_tiles
    live = torch.zeros(batch, groups, tiles * key_tiles, dtype=torch.bool, device=index.device)
    for further in range(-(-size // TILE) + 1):  # tiles that a block may reach into
        live.scatter_(-1, (tile + torch.minimum(start // TILE + further, last)).flatten(2), True)
    live = live.view(batch, groups, tiles, key_tiles).repeat_interleave(heads_per_group, dim=1)
    numbers, order = live.sum(-1, dtype=torch.int32), live.int().argsort(dim=-1, descending=True, stable=True).int()
    return BlockMask.from_kv_blocks(numbers, order, BLOCK_SIZE=TILE, mask_mod=visible, seq_lengths=(n_queries, n_keys))
