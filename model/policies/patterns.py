"""Sparse Transformer's fixed patterns: a local part, and columns or diagonals that reach all the text."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from model.policies.blocks import check_least
from model.policies.policy import Selection, SequenceView, SparsePolicy
from model.policies.window import places


@dataclass(frozen=True)
class StridedKeys:
    """Of each query the `stride` keys that end with its own, and every stride-th one before."""

    view: SequenceView
    stride: int
    device: torch.device

    def mask(self, rows: slice, n_keys: int) -> Tensor:
        query, key = places(self.view, rows, n_keys, self.device)
        distance = query - key
        return ((distance < self.stride) | (distance % self.stride == 0))[None]


@dataclass(frozen=True)
class FixedKeys:
    """Of each query its own block of keys, and `columns` keys of every block: the last ones for head 0, those before
    them for head 1, and so on, from the end again where a block has no more."""

    view: SequenceView
    block: int
    columns: int
    heads: int
    device: torch.device

    def mask(self, rows: slice, n_keys: int) -> Tensor:
        query, key = places(self.view, rows, n_keys, self.device)
        head = torch.arange(self.heads, device=self.device) % (self.block // self.columns)
        from_end = (self.block - 1 - key % self.block) // self.columns
        return (query // self.block == key // self.block) | (from_end == head[:, None])[:, None]


@dataclass(frozen=True)
class Strided(SparsePolicy):
    """Each query sees the `stride` keys that end with its own and every stride-th one before (Sparse Transformer,
    arXiv:1904.10509, section 4.3, its strided pattern, both parts in each head). Fewest keys at a stride of the text's
    square root; dense from stride = T on, and at 1. Default: Fixed's block."""

    name: ClassVar[str] = "strided"
    stride: int = 128

    def __post_init__(self) -> None:
        check_least(1, stride=self.stride)

    def select(self, q: Tensor, k: Tensor, view: SequenceView) -> Selection:
        return StridedKeys(view, self.stride, q.device)


@dataclass(frozen=True)
class Fixed(SparsePolicy):
    """Each query sees its own block of `block` keys and `columns` keys of every block before (Sparse Transformer,
    arXiv:1904.10509, section 4.3, its fixed pattern, both parts in each head): a block's last ones, heads taking turns
    from its end on. Blocks count from the start of the text. Dense from block = T on, and where columns are the block.
    Defaults: the paper's for Enwik8.
    """

    name: ClassVar[str] = "fixed"
    block: int = 128
    columns: int = 32

    def __post_init__(self) -> None:
        check_least(1, block=self.block, columns=self.columns)
        if self.columns > self.block:
            raise ValueError(f"columns is {self.columns}: expected at most block, {self.block}")

    def select(self, q: Tensor, k: Tensor, view: SequenceView) -> Selection:
        return FixedKeys(view, self.block, self.columns, len(q), q.device)
