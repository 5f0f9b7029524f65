"""SpargeAttention's two-stage filter."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kernels.common.visibility import TILE
from model.config import ModelConfig
from model.policies.block_attention import BlockPolicy
from model.policies.blocks import check_least, check_share, in_blocks, mean_scores, own_blocks, top_share
from model.policies.policy import Attended, Phase, SequenceView, masked_attention
from model.policies.selection import BlockSelection


@dataclass(frozen=True)
class SpargeAttention(BlockPolicy):
    """Two filters (SpargeAttn, arXiv:2502.18137, Algorithm 1), without the paper's INT8 products.

    First: of each block of queries the key blocks with most weight in the softmax of block means, until they cover
    `coverage` (eq. 5). Only blocks whose rows are alike, of mean cosine similarity above `similarity`, are judged by
    their means; of the others everything is kept. Second: the online softmax drops the values of a block where, for
    `warp_rows` queries, all its scores lie more than -`margin` below the running maximum of the blocks before; the
    softmax stays normalised with their weights (lines 15 and 16). Dense at coverage 1 and margin -inf.

    margin: lambda, in nats, negative. The density counts what passes both filters; scores are computed for all that
    passes the first. Own blocks are kept so that every query sees a key, which the paper leaves to their score. Without
    a margin blocks of 128 and 64, the defaults, run on the kernel (BlockPolicy), which has no second filter.
    """

    name: ClassVar[str] = "sparge"
    phases: ClassVar[frozenset[Phase]] = frozenset({"prefill"})
    coverage: float
    margin: float = -math.inf
    similarity: float = 0.5
    query_block: int = 128
    key_block: int = 64
    warp_rows: int = 32

    def __post_init__(self) -> None:
        check_share(coverage=self.coverage)
        check_least(1, query_block=self.query_block, key_block=self.key_block, warp_rows=self.warp_rows)
        if not self.margin < 0:
            raise ValueError(f"margin is {self.margin}: expected a negative number; -inf drops nothing")
        if TILE % self.warp_rows:
            raise ValueError(f"warp_rows is {self.warp_rows}: expected a divisor of {TILE}")

    @property
    def sizes(self) -> tuple[int, int]:
        return self.query_block, self.key_block

    def select(self, q: Tensor, k: Tensor, view: SequenceView) -> BlockSelection:
        sizes = self.sizes
        own = own_blocks(view, sizes, (q.shape[1], k.shape[1]), q.device)
        if self.coverage >= 1:
            return BlockSelection(torch.ones_like(own)[None], *sizes)
        unlike_q = cosine_similarity(q, self.query_block) <= self.similarity  # [H, query blocks]
        unlike_k = cosine_similarity(k, self.key_block) <= self.similarity  # [G, key blocks]
        unlike_k = unlike_k.repeat_interleave(len(q) // len(k), 0)[:, None]
        scores = mean_scores(q, k, view, sizes).masked_fill_(unlike_k, -torch.inf)
        kept = top_share(scores.softmax(-1).nan_to_num_(0.0), self.coverage)  # NaN: no block of the row is judged
        return BlockSelection(kept | unlike_q[..., None] | unlike_k | own, *sizes)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, view: SequenceView) -> Attended:
        if self.margin == -math.inf:
            return super().attend(q, k, v, view)
        return masked_attention(q, k, v, view, self.select(q, k, view), self._dropped)

    def faster(self, device: torch.device, config: ModelConfig) -> bool:
        return self.margin == -math.inf and super().faster(device, config)

    def _dropped(self, scores: Tensor, rows: slice) -> Tensor:
        """Bool like scores: the second filter."""
        n_rows, n_keys = scores.shape[1:]
        pad = (0, -n_keys % self.key_block, 0, -n_rows % self.warp_rows)
        blocks = torch.nn.functional.pad(scores, pad, value=-torch.inf).unflatten(2, (-1, self.key_block)).amax(3)
        below = (blocks - blocks.cummax(2).values).nan_to_num(nan=-torch.inf)  # -inf - -inf: nothing selected yet
        low = below.unflatten(1, (-1, self.warp_rows)).amax(2) < self.margin  # [H, warps, key blocks]
        return low.repeat_interleave(self.warp_rows, 1)[:, :n_rows].repeat_interleave(self.key_block, 2)[..., :n_keys]


def cosine_similarity(x: Tensor, size: int) -> Tensor:
    """Mean cosine similarity of all pairs of rows of each block, itself included: (heads, n, D) -> (heads, blocks)."""
    blocks, counts = in_blocks(torch.nn.functional.normalize(x.float(), dim=-1), size)
    return (blocks.sum(2) / counts[:, None]).square().sum(-1)  # |mean of unit vectors|^2 is the mean of their products
