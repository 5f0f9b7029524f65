"""Fixed patterns: Sparse Transformer's, a local part and columns or diagonals that reach all the text, and Longformer's
windows."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from model.policies.blocks import check_least
from model.policies.policy import SequenceView, SparsePolicy
from model.policies.selection import Selection
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
class DilatedKeys:
    """Of each query the `size` keys that end with its own; in the first `dilated` heads as many, only every gap-th."""

    view: SequenceView
    size: int
    dilated: int
    gap: int
    heads: int
    device: torch.device

    def mask(self, rows: slice, n_keys: int) -> Tensor:
        query, key = places(self.view, rows, n_keys, self.device)
        distance = query - key
        near = distance < self.size
        far = (distance < self.size * self.gap) & (distance % self.gap == 0)
        is_dilated = torch.arange(self.heads, device=self.device) < self.dilated
        return torch.where(is_dilated[:, None, None], far, near)


@dataclass(frozen=True)
class Longformer(SparsePolicy):
    """Sliding windows that grow evenly from `smallest` keys in the first layer to `largest` in the last; in the later
    half of the layers the first `dilated_heads` heads see as many keys with gaps, every `gap`-th one (Longformer,
    arXiv:2004.05150, sections 3.1 and 4.1, its language models). Dense where smallest = largest = T without gaps.

    Simplified: the paper's gaps grow with the layer. Its language models have no tokens that all others see.
    """

    name: ClassVar[str] = "longformer"
    smallest: int
    largest: int
    dilated_heads: int = 2
    gap: int = 2

    def __post_init__(self) -> None:
        check_least(1, smallest=self.smallest, gap=self.gap)
        check_least(self.smallest, largest=self.largest)
        check_least(0, dilated_heads=self.dilated_heads)

    def select(self, q: Tensor, k: Tensor, view: SequenceView) -> Selection:
        size = self.smallest + (self.largest - self.smallest) * view.layer // max(1, view.n_layers - 1)
        dilated = self.dilated_heads if 2 * view.layer >= view.n_layers else 0
        return DilatedKeys(view, size, dilated, self.gap, len(q), q.device)


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
