"""Which keys a policy keeps: what it answers, as a mask of any queries and keys."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Selection(Protocol):
    """Which keys are kept. It need not mind causality and windows: the attention over it does."""

    def mask(self, rows: slice, n_keys: int) -> Tensor:
        """Bool (H or 1, rows, n_keys) or less where that broadcasts: of queries `rows` (of this forward pass) and the
        first n_keys keys. rows.start is a multiple of TILE."""
        ...


@dataclass(frozen=True)
class BlockSelection:
    """Whole blocks. blocks: bool (H or 1, query blocks, key blocks), counted from query 0 and key 0 of the view, which
    stand at query_offset and key_offset of their first blocks."""

    blocks: Tensor
    query_block: int
    key_block: int
    query_offset: int = 0
    key_offset: int = 0

    def mask(self, rows: slice, n_keys: int) -> Tensor:
        device = self.blocks.device
        query = (torch.arange(rows.start, rows.stop, device=device) + self.query_offset) // self.query_block
        key = (torch.arange(n_keys, device=device) + self.key_offset) // self.key_block
        return self.blocks[:, query][:, :, key]


@dataclass(frozen=True)
class TokenSelection:
    """Single keys. keys: bool (H or 1, Tq or 1, Tk): for few queries, or the same for all."""

    keys: Tensor

    def mask(self, rows: slice, n_keys: int) -> Tensor:
        return (self.keys if self.keys.shape[1] == 1 else self.keys[:, rows])[..., :n_keys]
