"""MInference's two dynamic patterns: vertical and slash lines, and blocks (arXiv:2407.02490)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from model.policies.block_attention import BlockPolicy
from model.policies.blocks import check_least, last_weights, line_weights, mean_scores, own_blocks, top_count
from model.policies.policy import Phase, SequenceView, SparsePolicy
from model.policies.selection import BlockSelection, Selection

SURE_LINES = 30  # first keys and nearest diagonals, which the authors' code always takes


@dataclass(frozen=True)
class Lines:
    """columns: bool (H, keys). distances: bool (H, keys), by distance from query to key."""

    columns: Tensor
    distances: Tensor
    query_start: int

    def mask(self, rows: slice, n_keys: int) -> Tensor:
        query = torch.arange(rows.start, rows.stop, device=self.columns.device) + self.query_start
        distance = query[:, None] - torch.arange(n_keys, device=query.device)
        return self.columns[:, None, :n_keys] | self.distances[:, distance.clamp(min=0)]


@dataclass(frozen=True)
class VerticalSlash(SparsePolicy):
    """Each head keeps `verticals` keys (for all queries) and `slashes` diagonals: those with most weight in the exact
    attention of the last `observed` queries (MInference, arXiv:2407.02490, Algorithm 2). The first keys and the nearest
    diagonals come first. Dense from slashes = T on.

    All heads have the same numbers; the paper's search of a pattern and its numbers for each head is
    model/policies/head_patterns.py. Simplified: diagonals are single, where its kernel reads the 64 x 64 blocks that
    they pass.
    """

    name: ClassVar[str] = "vertical_slash"
    phases: ClassVar[frozenset[Phase]] = frozenset({"prefill"})
    verticals: int
    slashes: int
    observed: int = 64

    def __post_init__(self) -> None:
        check_least(1, verticals=self.verticals, slashes=self.slashes, observed=self.observed)

    def select(self, q: Tensor, k: Tensor, view: SequenceView) -> Selection:
        return chosen_lines(q, k, view, self.verticals, self.slashes, self.observed)


def chosen_lines(
    q: Tensor, k: Tensor, view: SequenceView, verticals: int | Tensor, slashes: int | Tensor, observed: int
) -> Lines:
    """Algorithm 2. verticals, slashes: of all heads, or int64 (H,)."""
    by_key, by_distance = line_weights(last_weights(q, k, view, observed))
    for weights in (by_key, by_distance):
        weights[:, :SURE_LINES] = torch.inf  # of these the first ones, where there are more than lines
    return Lines(top_count(by_key, verticals), top_count(by_distance, slashes), view.query_start)


@dataclass(frozen=True)
class BlockSparse(BlockPolicy):
    """Keeps, for each block of queries, the `blocks` key blocks with the largest score of mean query and mean key
    (MInference, arXiv:2407.02490, Algorithm 3), its own ones among them. Dense where blocks cover all keys.

    Own blocks are kept so that every query sees a key, which the paper leaves to their score. Blocks of 64, the
    default, and multiples run on the kernel (BlockPolicy).
    """

    name: ClassVar[str] = "block_sparse"
    phases: ClassVar[frozenset[Phase]] = frozenset({"prefill"})
    blocks: int
    block: int = 64

    def __post_init__(self) -> None:
        check_least(1, blocks=self.blocks, block=self.block)

    @property
    def sizes(self) -> tuple[int, int]:
        return self.block, self.block

    def select(self, q: Tensor, k: Tensor, view: SequenceView) -> BlockSelection:
        own = own_blocks(view, self.sizes, (q.shape[1], k.shape[1]), q.device)
        scores = mean_scores(q, k, view, self.sizes).masked_fill_(own, torch.inf)
        return BlockSelection(top_count(scores, self.blocks) | own, *self.sizes)
