"""Sketch-and-Walk: blocks that a walk reaches over sketched attention of blocks, carried on from layer to layer."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch
import xxhash
from torch import Tensor

from model.policies.block_attention import BlockPolicy
from model.policies.blocks import (
    block_means,
    check_least,
    check_share,
    in_blocks,
    scores_of_means,
    top_count,
    visible_blocks,
)
from model.policies.eviction import check_whole_prompt
from model.policies.policy import SequenceView
from model.policies.selection import BlockSelection


@dataclass(frozen=True)
class SketchWalk(BlockPolicy):
    """Blocks of keys, the same for all heads, by a walk over the attention of blocks (Sketch-and-Walk,
    arXiv:2602.07397). Dense at top 1.

    A, (blocks, blocks), estimates a layer's attention: softmax over the sketched scores of mean queries and mean keys
    of `block` tokens, averaged over heads. A sketch is random signs, an orthonormal Hadamard rotation and `channels` of
    its channels, all of them where the head has no more, so that scores are exact then. Walk scores S begin as those of
    the layer below (view.below), in the first layer that chooses as A, and become (1 - beta) A + beta S A, `steps`
    times. Of the blocks that it sees, a block of queries keeps the share `window` nearest to it, `sinks` first ones,
    and of the rest those whose score lies above the quantile 1 - top. The first `dense_layers` layers see everything.

    A decoded token's row of A is the mean over the last `observed` queries. The row of its block in A is the mean over
    the block's tokens so far, where those of the prompt count with their mean query's row.

    The authors' code differs, this follows the paper:
    - its A has no causal mask, so that later keys steer;
    - its Hadamard rotation is not normalised, and scores are divided by 100;
    - its decoding leaves S of the layer below out, and adds the row of the last block to A's column as well;
    - its last 4 blocks of queries are dense, and its first keys get the window's share.

    Shares are of what a block of queries sees, in whole blocks, where the paper takes the whole text's: so later blocks
    change nothing, and a prompt in chunks of whole blocks is one prompt. A chunk that ends within a block judges it by
    its tokens so far. ALiBi's bias is that of mean distances. The density counts reading mean keys (channels / 2D of a
    key and its value) and A once. Simplified: means are computed anew at each step; A is kept whole, (T / block)^2
    numbers a layer. Blocks of 64, the default, and multiples run on the kernel (BlockPolicy).
    """

    name: ClassVar[str] = "sketch_walk"
    remembers: ClassVar[bool] = True
    top: float = 0.125
    window: float = 0.05
    sinks: float = 0.025
    block: int = 64
    channels: int = 128
    beta: float = 0.25
    steps: int = 3
    observed: int = 32
    dense_layers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_share(top=self.top, window=self.window, sinks=self.sinks)
        check_least(1, block=self.block, channels=self.channels, steps=self.steps, observed=self.observed)
        check_least(0, dense_layers=self.dense_layers, seed=self.seed)
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta is {self.beta}: expected the walk's share in [0, 1); 0 takes no step")

    @property
    def sizes(self) -> tuple[int, int]:
        return self.block, self.block

    def observe(self, q: Tensor, k: Tensor, view: SequenceView) -> None:
        self._check(view)
        if not self._dense(view):
            self.attention_rows(q, k, view)

    def select(self, q: Tensor, k: Tensor, view: SequenceView) -> BlockSelection:
        return self.choose(q, k, view)[0]

    def choose(self, q: Tensor, k: Tensor, view: SequenceView) -> tuple[BlockSelection, Tensor | int]:
        """Takes the queries up into view.memory: once a forward pass."""
        self._check(view)
        inside = view.query_start % self.block
        from_edge = replace(view, query_start=view.query_start - inside)
        seen = visible_blocks(from_edge, self.sizes, (q.shape[1] + inside, k.shape[1]), q.device)  # [rows, blocks]
        if self._dense(view):
            return BlockSelection(torch.ones_like(seen)[None], *self.sizes, query_offset=inside), 0
        rows = self.attention_rows(q, k, view)
        attention = view.memory["attention"]
        scores = view.below.pop("walk", rows)
        for _ in range(self.steps):
            scores = (1 - self.beta) * rows + self.beta * scores @ attention
        view.memory["walk"] = scores
        kept = self._kept(scores, seen, from_edge.query_start // self.block)
        n_blocks, size = len(attention), q.shape[2]
        numbers = seen.sum() * min(self.channels, _rotated(size))
        numbers = numbers + n_blocks * (n_blocks + 1) // 2 // len(q)  # A is there once for all heads
        return BlockSelection(kept[None], *self.sizes, query_offset=inside), -(-numbers // (2 * size))

    def _kept(self, scores: Tensor, seen: Tensor, first: int) -> Tensor:
        """Bool (rows, blocks), like scores and seen. first: the block of the first row."""
        n_rows, n_blocks = seen.shape
        place = torch.arange(n_blocks, device=seen.device)
        distance = (torch.arange(n_rows, device=seen.device) + first)[:, None] - place
        n_seen = seen.sum(-1, keepdim=True).double()
        sure = seen & ((distance < (self.window * n_seen).ceil()) | (place < (self.sinks * n_seen).ceil()))
        rest = seen & ~sure
        above = ((rest.sum(-1) - 1).clamp(min=0).double() * self.top).ceil().long()  # as many as exceed the quantile
        return sure | top_count(scores.masked_fill(~rest, -torch.inf), above)

    def attention_rows(self, q: Tensor, k: Tensor, view: SequenceView) -> Tensor:
        """The rows of A that belong to these queries, float32 (rows, blocks), after view.memory["attention"] has been
        brought up to them: float32 (blocks, blocks), the last row that of the last query's block."""
        inside, memory = view.query_start % self.block, view.memory
        before = memory.get("queries", q[:, :0])
        memory["queries"] = torch.cat([before, q], 1)[:, -self.observed :].clone()
        sums, counts = in_blocks(torch.nn.functional.pad(q, (0, 0, inside, 0)), self.block)
        sums = sums.sum(2)  # [H, rows, D]
        if inside:
            sums[:, 0] += memory["sum"]
        memory["sum"] = sums[:, -1].clone()  # of the last block's queries
        if view.decoding:
            rows = self._token_row(memory["queries"], k, view)
        else:
            means, n_queries = sums / counts[:, None], q.shape[1] + inside
            from_edge = replace(view, query_start=view.query_start - inside)
            rows = self._weights(means, k, from_edge, (self.block, self.block), n_queries)
        first, n_blocks = (view.query_start - inside) // self.block, rows.shape[1]
        whole = rows
        if view.decoding and inside:
            whole = memory["attention"][first:] + (rows - memory["attention"][first:]) / (inside + 1)
        if first:
            held = memory["attention"][:first]
            whole = torch.cat([torch.nn.functional.pad(held, (0, n_blocks - held.shape[1])), whole])
        memory["attention"] = whole
        return rows

    def _token_row(self, queries: Tensor, k: Tensor, view: SequenceView) -> Tensor:
        """Float32 (1, blocks), the mean of the rows of the queries, (H, n, D), all of them where the token stands."""
        n = queries.shape[1]
        slopes = None if view.alibi_slopes is None else view.alibi_slopes.repeat_interleave(n)
        as_heads = queries.float().flatten(0, 1)[:, None]  # [H n, 1, D]
        return self._weights(as_heads, k, replace(view, alibi_slopes=slopes), (1, self.block), 1)

    def _weights(self, means: Tensor, k: Tensor, view: SequenceView, sizes: tuple[int, int], n_queries: int) -> Tensor:
        """Float32 (rows, blocks), the mean over heads. means: (heads, rows, D)."""
        sketch = sketch_of(k.shape[2], self.channels, f"{self.seed} {view.layer}", k.device)
        mean_k = block_means(k, self.block)
        scores = scores_of_means(means @ sketch, mean_k @ sketch, view, sizes, (n_queries, k.shape[1]))
        return scores.softmax(-1).mean(0)

    def _dense(self, view: SequenceView) -> bool:
        return self.top == 1 or view.layer < self.dense_layers

    def _check(self, view: SequenceView) -> None:
        known = view.query_start if self._dense(view) else "sum" in view.memory
        check_whole_prompt(self.name, view, known, view.query_start)


def _rotated(size: int) -> int:
    """Channels of a Hadamard rotation of `size` ones: the next power of 2."""
    return int(2 ** (size - 1).bit_length())


@lru_cache(maxsize=256)
def sketch_of(size: int, channels: int, seed: str, device: torch.device) -> Tensor:
    """Float32 (size, channels or the next power of 2 from size on, the smaller one): S with E[(x S) . (y S)] = x . y
    over seeds, and exactly that where all channels are kept. Random signs, the orthonormal Hadamard rotation of as many
    channels as the next power of 2, and channels of that without replacement."""
    full = _rotated(size)
    generator = torch.Generator().manual_seed(xxhash.xxh32_intdigest(seed.encode()))
    signs = torch.randint(0, 2, (full, 1), generator=generator) * 2.0 - 1
    hadamard = torch.ones(1, 1)
    while len(hadamard) < full:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    kept = torch.randperm(full, generator=generator)[:channels]
    return (signs * hadamard[:, kept])[:size].div(len(kept) ** 0.5).to(device)
