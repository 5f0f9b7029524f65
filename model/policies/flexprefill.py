"""FlexPrefill: each head chooses its pattern, and keeps as many blocks as cover a share of the attention."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from model.policies.block_attention import BlockPolicy
from model.policies.blocks import (
    block_edges,
    check_least,
    check_share,
    last_weights,
    line_weights,
    mean_scores,
    own_blocks,
    top_count,
    top_share,
)
from model.policies.policy import Phase, SequenceView
from model.policies.selection import BlockSelection


@dataclass(frozen=True)
class FlexPrefill(BlockPolicy):
    """Blocks from the exact attention of the last block of queries (FlexPrefill, arXiv:2502.20766).

    Algorithm 1: a head whose pooled estimate of that attention, softmax over mean keys, lies within a Jensen-Shannon
    distance of `tau` of its block sums is query-aware, else vertical-slash. Algorithm 2, vertical-slash heads: as many
    key blocks and diagonals of blocks as are filled by the single keys and diagonals that cover `coverage` of that
    attention. Algorithm 3, query-aware heads: the blocks with most weight in the pooled attention of all blocks, until
    they cover `coverage` of it. All heads keep the first key block, their own, and lines of at least `least_keys` keys.
    Dense at coverage 1, and up to two blocks or least_keys of text.

    Simplified: block maps in place of index lists. Counts, and what is always kept, are the authors' code's. Blocks of
    128, the default, or 64 run on the kernel (BlockPolicy).
    """

    name: ClassVar[str] = "flexprefill"
    phases: ClassVar[frozenset[Phase]] = frozenset({"prefill"})
    coverage: float
    tau: float = 0.1
    least_keys: int = 1024
    block: int = 128

    def __post_init__(self) -> None:
        check_share(coverage=self.coverage)
        check_least(1, least_keys=self.least_keys, block=self.block)
        if not self.tau >= 0:
            raise ValueError(f"tau is {self.tau}: expected a distance of at least 0 (0: no head is query-aware)")

    @property
    def sizes(self) -> tuple[int, int]:
        return self.block, self.block

    def select(self, q: Tensor, k: Tensor, view: SequenceView) -> BlockSelection:
        sizes, lengths = self.sizes, (q.shape[1], k.shape[1])
        own = own_blocks(view, sizes, lengths, q.device)
        if self.coverage >= 1 or k.shape[1] <= max(2 * self.block, self.least_keys):
            return BlockSelection(torch.ones_like(own)[None], *sizes)
        weights = last_weights(q, k, view, self.block)
        by_key, by_distance = (x / weights.shape[1] for x in line_weights(weights))
        watched = replace(view, query_start=k.shape[1] - weights.shape[1])
        estimate = mean_scores(q[:, -self.block :], k, watched, sizes)[:, 0].softmax(-1)  # [H, key blocks]
        columns = self._block_sums(by_key)
        aware = js_distance(estimate, columns) < self.tau
        kept = self._lines(by_key, by_distance, aware, view, lengths) | own
        pooled = mean_scores(q, k, view, sizes).softmax(-1)
        covering = top_share(pooled.flatten(1) / pooled.shape[1], self.coverage).view_as(pooled)
        return BlockSelection(kept | (covering & aware[:, None, None]), *sizes)

    def _lines(
        self, by_key: Tensor, by_distance: Tensor, aware: Tensor, view: SequenceView, lengths: tuple[int, int]
    ) -> Tensor:
        """Bool (H, query blocks, key blocks): vertical and slash lines of blocks; the least number for aware heads."""
        columns, slashes = self._block_sums(by_key), self._block_sums(by_distance)
        columns[:, 0] = slashes[:, 0] = torch.inf
        columns, slashes = (
            top_count(blocks, self._count(lines).masked_fill(aware, self._least_blocks(lines)))
            for blocks, lines in ((columns, by_key), (slashes, by_distance))
        )
        first, last = (edge + view.query_start for edge in block_edges(lengths[0], self.block, by_key.device))
        place = torch.arange(columns.shape[1], device=by_key.device)
        kept = columns[:, None]
        for edge in (first, last):  # a chunk of a prompt may begin within a key block
            kept = kept | slashes[:, (edge[:, None] // self.block - place).clamp(min=0)]
        return kept

    def _count(self, weights: Tensor) -> Tensor:
        """int64 (H,): blocks that the fewest entries covering `coverage` fill. weights: (H, keys), sum 1."""
        return (top_share(weights, self.coverage).sum(-1) // self.block + 1).clamp(min=self._least_blocks(weights))

    def _least_blocks(self, weights: Tensor) -> int:
        return -(-min(self.least_keys, weights.shape[1]) // self.block)

    def _block_sums(self, weights: Tensor) -> Tensor:
        """(H, keys) -> (H, blocks)."""
        pad = (0, -weights.shape[1] % self.block)
        return torch.nn.functional.pad(weights, pad).unflatten(1, (-1, self.block)).sum(2)


def js_distance(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence, in nats, of distributions along the last dim."""
    middle = (p + q) / 2
    halves = (torch.special.xlogy(x, x / middle.clamp(min=torch.finfo(x.dtype).tiny)).sum(-1) for x in (p, q))
    return (sum(halves, torch.zeros_like(p[..., 0])) / 2).clamp(min=0).sqrt()
