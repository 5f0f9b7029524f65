"""SnapKV and Ada-SnapKV: after the prompt, keys that its last queries did not look at are evicted."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from model.policies.blocks import check_least, check_share, last_weights, top_count
from model.policies.policy import Phase, Selection, SequenceView, SparsePolicy, TokenSelection


@dataclass(frozen=True)
class SnapKV(SparsePolicy):
    """Decoding sees `capacity` keys of the prompt, chosen once, and all later ones (SnapKV, arXiv:2404.14469): its last
    `observed` keys, and those with most weight in the exact attention of its last `observed` queries, averaged over
    `pooled` neighbouring keys. Dense where the capacity holds the prompt.

    Each query head chooses for itself, as in the authors' code. Simplified: keys are hidden, not freed. The prompt ends
    before the first token that is passed alone.
    """

    name: ClassVar[str] = "snapkv"
    phases: ClassVar[frozenset[Phase]] = frozenset({"decode"})
    remembers: ClassVar[bool] = True
    capacity: int
    observed: int = 32
    pooled: int = 5

    def __post_init__(self) -> None:
        check_least(1, capacity=self.capacity, observed=self.observed, pooled=self.pooled)
        if self.pooled % 2 == 0:
            raise ValueError(f"pooled is {self.pooled}: expected an odd number of keys, so that each has a centre")

    def observe(self, q: Tensor, k: Tensor, view: SequenceView) -> None:
        before = view.memory.get("queries")
        view.memory["queries"] = (q if before is None else torch.cat([before, q], 1))[:, -self.observed :].clone()

    def select(self, q: Tensor, k: Tensor, view: SequenceView) -> Selection:
        if view.key_start:
            raise ValueError(f"{self.name} chooses from whole prompts: not from a cache that a window has cut")
        if "kept" not in view.memory:
            view.memory["kept"] = self._choose(k[:, : view.query_start], view)
        kept = view.memory["kept"]
        return TokenSelection(torch.nn.functional.pad(kept, (0, k.shape[1] - kept.shape[1]), value=True)[:, None])

    def _choose(self, k: Tensor, view: SequenceView) -> Tensor:
        """Bool (H, prompt): which keys of the prompt stay."""
        n_keys, queries = k.shape[1], view.memory.get("queries")
        if n_keys and queries is None:
            raise ValueError(f"{self.name} has seen no prompt: start under the policy with an empty cache")
        n_seen = 0 if queries is None else queries.shape[1]
        if queries is None or n_seen == n_keys:
            return torch.ones(1, n_keys, dtype=torch.bool, device=k.device)
        watched = replace(view, query_start=n_keys - n_seen)
        weights = last_weights(queries, k, watched, n_seen).sum(1)[:, : n_keys - n_seen]
        pooled = torch.nn.functional.avg_pool1d(weights, self.pooled, 1, self.pooled // 2)
        chosen = top_count(pooled, self.budgets(pooled, max(0, self.capacity - n_seen)))
        return torch.nn.functional.pad(chosen, (0, n_seen), value=True)

    def budgets(self, weights: Tensor, each: int) -> Tensor:
        """int64 (H,): keys that each head keeps of those before the observed ones. weights: (H, keys)."""
        return torch.full(weights.shape[:1], each, device=weights.device)


@dataclass(frozen=True)
class AdaSnapKV(SnapKV):
    """SnapKV with the capacity of a layer divided among its heads (Ada-KV, arXiv:2407.11550, Algorithm 1): each gets as
    many as it has among the largest weights of all heads together, mixed with an even share.

    even: share of the capacity that is dealt evenly (the authors' code has 0.2).
    """

    name: ClassVar[str] = "ada_snapkv"
    even: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(even=self.even)

    def budgets(self, weights: Tensor, each: int) -> Tensor:
        among_all = top_count(weights.flatten(), each * len(weights)).view_as(weights).sum(-1)
        return (self.even * each + (1 - self.even) * among_all).long()
