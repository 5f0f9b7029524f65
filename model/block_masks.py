"""FlexAttention's block masks, made from what queries see at most instead of from every pair of a query and a key.

torch's create_block_mask asks for each pair, which takes time that grows with the square of the length, and on CUDA a
kernel of its own to be compiled for each kind of mask.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

TILE = 128  # queries and keys of a tile
# (b, h, i, j) -> bool tensor of batch row, query head, query and key, as FlexAttention takes it
Visible = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def block_mask_of_intervals(
    visible: Visible, first: Tensor, last: Tensor, n_keys: int, exact: bool = True
) -> BlockMask:
    """Of what is alike in all heads.

    Args:
        first, last: int64 (b or 1, n), the keys from and up to which each query sees some; last below first: none.
        exact: each query sees all keys between; then tiles that are seen whole are computed without `visible`.
    """
    n_queries, start = first.shape[1], torch.arange(0, n_keys, TILE, device=first.device)
    stop, some = start + TILE - 1, last >= first

    def tiles(ends: Tensor, beyond: int) -> Tensor:
        """(b or 1, query tiles, TILE, 1). beyond: stands for queries that there are not, or that see nothing."""
        padded = pad(ends.where(some, beyond), (0, -n_queries % TILE), value=beyond)
        return padded.unflatten(1, (-1, TILE))[..., None]

    live = (tiles(first, n_keys).amin(2) <= stop) & (tiles(last, -1).amax(2) >= start)
    full = live & (tiles(first, n_keys).amax(2) <= start) & (tiles(last, -1).amin(2) >= stop) if exact else None
    return block_mask_of_tiles(live[:, None], visible, n_queries, n_keys, None if full is None else full[:, None])


def block_mask_of_tiles(
    live: Tensor, visible: Visible, n_queries: int, n_keys: int, full: Tensor | None = None
) -> BlockMask:
    """live: bool (B, H or 1, tiles of queries, tiles of keys), those that hold a key which a query of theirs sees.
    full: of these, the tiles of which all queries see all keys; None where that is not known."""
    partial = live if full is None else live & ~full
    numbers, order = _listed(partial)
    full_numbers, full_order = (None, None) if full is None else _listed(full)
    return BlockMask.from_kv_blocks(
        numbers, order, full_numbers, full_order, BLOCK_SIZE=TILE, mask_mod=visible, seq_lengths=(n_queries, n_keys)
    )


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles of keys each tile of queries has, int32, and which, these first."""
    order = tiles.int().argsort(dim=-1, descending=True, stable=True).int()
    return tiles.sum(-1, dtype=torch.int32), order
