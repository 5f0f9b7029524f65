"""The oracle: which key blocks hold most of the attention, known from the attention itself."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kernels.common.visibility import TILE
from model.config import ModelConfig
from model.policies.block_attention import BlockPolicy
from model.policies.blocks import check_least, own_blocks, top_count
from model.policies.policy import SequenceView
from model.policies.selection import BlockSelection


@dataclass(frozen=True)
class OracleTopK(BlockPolicy):
    """Keeps, for each block of queries, the `blocks` key blocks with most exact attention weight, its own among them.

    What every method that estimates block weights aims at (an upper bound of theirs at equal density, though not of
    methods that choose by key or by head); computing it costs dense attention. Dense where blocks cover all keys, which
    count from the text's first key. Only attention over the blocks of 64, the default, runs on the kernel
    (BlockPolicy).
    """

    name: ClassVar[str] = "oracle"
    blocks: int
    block: int = 64

    def __post_init__(self) -> None:
        check_least(1, blocks=self.blocks, block=self.block)
        if TILE % self.block:
            raise ValueError(f"block is {self.block}: expected a divisor of {TILE}")

    @property
    def sizes(self) -> tuple[int, int]:
        return self.block, self.block

    def faster(self, device: torch.device, config: ModelConfig) -> bool:
        return False  # `select` computes dense attention

    def select(self, q: Tensor, k: Tensor, view: SequenceView) -> BlockSelection:
        sizes, offset = self.sizes, view.key_start % self.block
        counted = replace(view, query_start=view.query_start + offset)  # from the first key of a block of the text
        own = own_blocks(counted, sizes, (q.shape[1], k.shape[1] + offset), q.device)
        weights = torch.zeros(len(q), *own.shape, device=q.device)
        for rows in view.row_blocks(q, k.shape[1]):
            n_keys = view.query_start + rows.stop
            p = torch.softmax(view.scores(q, k, rows, n_keys), -1)
            pad = (offset, -(n_keys + offset) % self.block, 0, -p.shape[1] % self.block)
            p = torch.nn.functional.pad(p, pad).unflatten(2, (-1, self.block)).unflatten(1, (-1, self.block))
            first = rows.start // self.block
            weights[:, first : first + p.shape[1], : p.shape[3]] = p.sum((2, 4))
        kept = top_count(weights.masked_fill_(own, torch.inf), self.blocks) | own
        return BlockSelection(kept, *sizes, key_offset=offset)
