"""What each branch of Native Sparse Attention lets queries see."""

from torch import Tensor

from model.nsa.blocks import Blocks
from model.visible_attention import View, alibi


def compression_branch(blocks: Blocks, slopes: Tensor | None) -> View:
    first = blocks.first_block.expand_as(blocks.position)
    last = (first + blocks.position // blocks.config.compress_stride).clamp(max=len(blocks.first_key) - 1)
    return View(blocks.sees_compressed(), alibi(slopes, blocks.distance(blocks.last_position)), first, last)


def selection_branch(blocks: Blocks, slopes: Tensor | None, chosen: Tensor, heads_per_group: int) -> View:
    """chosen: as `select_blocks` gives it."""
    visible = blocks.sees_selected(chosen, heads_per_group)
    return blocks.view_of(visible, alibi(slopes, blocks.distance(blocks.key_position)))


def window_branch(blocks: Blocks, slopes: Tensor | None) -> View:
    first = blocks.own_key - blocks.position.clamp(max=blocks.config.window - 1)
    bias = alibi(slopes, blocks.distance(blocks.key_position))
    return View(blocks.sees_window(), bias, first, blocks.own_key, blocks.reach)
