"""What each branch of Native Sparse Attention lets queries see."""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from model.nsa.blocks import Blocks
from model.nsa.selection import Selection
from model.visible_attention import TILE, View, Visible, alibi, block_mask_of_tiles


def compression_branch(blocks: Blocks, slopes: Tensor | None) -> View:
    first = blocks.first_block.expand_as(blocks.position)
    last = (first + blocks.position // blocks.config.compress_stride).clamp(max=len(blocks.first_key) - 1)
    return View(blocks.sees_compressed(), alibi(slopes, blocks.distance(blocks.last_position)), first, last)


def selection_branch(blocks: Blocks, slopes: Tensor | None, selected: Tensor, heads_per_group: int) -> View:
    first, visible = blocks.own_key - blocks.position, blocks.sees_selected(selected, heads_per_group)
    return View(visible, alibi(slopes, blocks.distance(blocks.key_position)), first, blocks.own_key)


def window_branch(blocks: Blocks, slopes: Tensor | None) -> View:
    first = blocks.own_key - blocks.position.clamp(max=blocks.config.window - 1)
    return View(blocks.sees_window(), alibi(slopes, blocks.distance(blocks.key_position)), first, blocks.own_key)


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
    return block_mask_of_tiles(live, visible, n_queries, n_keys)
