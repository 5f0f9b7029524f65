"""What a sparse attention pass did: support sizes and live tiles."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.common.visibility import TILE


@dataclass(frozen=True)
class AttentionStats:
    """support: int32 (B, H, Tq), keys with non-zero weight of each query. live_tiles: int64 (B, H), 64 x 64 tiles
    (on the grid of query and key indices) that hold support. total_tiles: int64 (B,), tiles in which some query sees
    some key. passes: float32 (B, H), passes over listed tiles that the threshold took, the one that sums values
    included, mean over tiles of queries; None from backends that list no tiles."""

    support: Tensor
    live_tiles: Tensor
    total_tiles: Tensor
    passes: Tensor | None = None

    @property
    def live_share(self) -> Tensor:
        """float32 (B, H): live tiles over total tiles."""
        return self.live_tiles.float() / self.total_tiles.clamp(min=1)[:, None]


def count_live_tiles(live: Tensor, key_start: int) -> Tensor:
    """int64 (..., ) tiles with any True. live: bool (..., rows, keys); rows start on the tile grid, keys at index
    key_start."""
    rows, keys = live.shape[-2:]
    left = key_start % TILE
    live = torch.nn.functional.pad(live, (left, -(left + keys) % TILE, 0, -rows % TILE))
    tiles = live.unflatten(-1, (-1, TILE)).any(-1).unflatten(-2, (-1, TILE)).any(-2)
    return tiles.sum((-1, -2))
