"""SnapKV, PyramidKV and Ada-SnapKV: after the prompt, keys that its last queries did not look at are evicted."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from model.policies.blocks import check_least, last_weights, top_count
from model.policies.eviction import Budgets, EvictingPolicy, check_whole_prompt, of_query_heads
from model.policies.policy import SequenceView
from model.policies.selection import Selection, TokenSelection

Pooling = Literal["mean", "max"]


@dataclass(frozen=True)
class SnapKV(EvictingPolicy):
    """Decoding sees `capacity` keys of the prompt, chosen once, and all later ones (SnapKV, arXiv:2404.14469): its last
    `observed` keys, and those with most weight in the exact attention of its last `observed` queries, of which each key
    has the mean (or the maximum, `pooling`) over `pooled` neighbours. Dense where the capacity holds the prompt.

    Each query head chooses for itself, as in the authors' code; budgets.grouped changes that, and the other budgets
    that of layers and heads. The prompt ends before the first token that is passed alone. use_policy hides keys,
    model.inference.evicting frees them.
    """

    name: ClassVar[str] = "snapkv"
    capacity: int
    observed: int = 32
    pooled: int = 5
    pooling: Pooling = "mean"
    budgets: Budgets = Budgets(grouped=False)

    def __post_init__(self) -> None:
        check_least(1, capacity=self.capacity, observed=self.observed, pooled=self.pooled)
        if self.pooled % 2 == 0:
            raise ValueError(f"pooled is {self.pooled}: expected an odd number of keys, so that each has a centre")
        if self.pooling not in get_args(Pooling):
            raise ValueError(f"pooling is {self.pooling!r}: expected one of {get_args(Pooling)}")

    def observe(self, q: Tensor, k: Tensor, view: SequenceView) -> None:
        before = view.memory.get("queries")
        view.memory["queries"] = (q if before is None else torch.cat([before, q], 1))[:, -self.observed :].clone()

    def select(self, q: Tensor, k: Tensor, view: SequenceView) -> Selection:
        chosen = self.evict(k[:, : view.query_start], view)
        if chosen is not None:
            view.memory["kept"] = of_query_heads(chosen, len(q))
        kept = view.memory["kept"]
        return TokenSelection(torch.nn.functional.pad(kept, (0, k.shape[1] - kept.shape[1]), value=True)[:, None])

    def evict(self, k: Tensor, view: SequenceView) -> Tensor | None:
        """Once, at the end of the prompt."""
        if view.memory.get("chosen"):
            return None
        queries = view.memory.pop("queries", k[:, :0])
        check_whole_prompt(self.name, view, queries.shape[1], view.query_start)
        view.memory["chosen"] = True
        return self._choose(queries, k, view)

    def _choose(self, queries: Tensor, k: Tensor, view: SequenceView) -> Tensor:
        """Bool (heads that choose, prompt): which keys of the prompt stay. queries: its last ones, (H, n, D)."""
        n_keys, n_seen = k.shape[1], queries.shape[1]
        if n_seen == n_keys:
            return torch.ones(1, n_keys, dtype=torch.bool, device=k.device)
        watched = replace(view, query_start=n_keys - n_seen)
        weights = last_weights(queries, k, watched, n_seen).sum(1)[:, : n_keys - n_seen]
        pool = torch.nn.functional.avg_pool1d if self.pooling == "mean" else torch.nn.functional.max_pool1d
        scores = pool(self.budgets.scores(weights, len(k)), self.pooled, 1, self.pooled // 2)
        chosen = top_count(scores, self.budgets.counts(scores, max(0, self.capacity - n_seen), view))
        return torch.nn.functional.pad(chosen, (0, n_seen), value=True)


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV whose capacity shrinks from layer to layer (PyramidKV, arXiv:2406.02069, with the settings of its
    LongBench runs): `capacity` is the mean over layers. Query heads that share keys keep the same ones."""

    name: ClassVar[str] = "pyramidkv"
    observed: int = 8
    pooled: int = 7
    pooling: Pooling = "max"
    budgets: Budgets = Budgets(beta=20)


@dataclass(frozen=True)
class AdaSnapKV(SnapKV):
    """SnapKV with the capacity of a layer divided among its heads (Ada-KV, arXiv:2407.11550, with the settings of its
    authors' code). Query heads that share keys keep the same ones, its option for such models."""

    name: ClassVar[str] = "ada_snapkv"
    pooled: int = 7
    pooling: Pooling = "max"
    budgets: Budgets = Budgets(even=0.2)
