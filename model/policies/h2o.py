"""H2O: keys that have had little attention so far are evicted, at every step."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from model.policies.blocks import check_least, top_count
from model.policies.eviction import Budgets, EvictingPolicy, check_whole_prompt, of_query_heads
from model.policies.policy import SequenceView
from model.policies.selection import Selection, TokenSelection


@dataclass(frozen=True)
class H2O(EvictingPolicy):
    """Decoding keeps the `recent` newest keys and of the older ones the `heavy` that have had most attention (H2O,
    arXiv:2306.14048, Algorithm 1): the softmax weights of all queries so far, summed. Before each token all others are
    evicted, for good: later sums run over what is left. The token's own key comes in addition. Dense where heavy and
    recent hold the text.

    The paper takes a tenth of the text for each. Query heads that share keys have one sum (Budgets), where the paper's
    models share none. Budgets of layers (beta) follow the text as it grows. With budgets of heads (even) both are set
    when keys are first evicted, since a head cannot get back what it lacks: behind a prompt that is hardly longer than
    the budget all are nearly alike. Simplified: the prompt is read densely, and so is one that goes on later. `select`
    counts: once a token. use_policy hides keys, model.inference.evicting frees them.
    """

    name: ClassVar[str] = "h2o"
    weighs: ClassVar[bool] = True
    heavy: int
    recent: int
    budgets: Budgets = Budgets()

    def __post_init__(self) -> None:
        check_least(1, heavy=self.heavy, recent=self.recent)

    def observe(self, q: Tensor, k: Tensor, view: SequenceView) -> None:
        self._check(view)
        sums = torch.zeros(len(q), k.shape[1], device=q.device)
        for rows in view.row_blocks(q, k.shape[1]):
            n_keys = view.query_start + rows.stop
            sums[:, :n_keys] += torch.softmax(view.scores(q, k, rows, n_keys), -1).sum(1)
        self._add(sums, len(k), view, q.shape[1])

    def select(self, q: Tensor, k: Tensor, view: SequenceView) -> Selection:
        self._check(view)
        n_keys = k.shape[1]
        if "sums" in view.memory:
            self._evict(view)
        kept = torch.ones(1, n_keys, dtype=torch.bool, device=k.device)
        if "alive" in view.memory:
            kept = of_query_heads(_longer(view.memory["alive"], n_keys, True), len(q))
        scores = view.scores(q, k, slice(0, 1), n_keys)[:, 0].masked_fill(~kept, -torch.inf)
        self._add(torch.softmax(scores, -1), len(k), view, 1)
        return TokenSelection(kept[:, None])

    def evict(self, k: Tensor, view: SequenceView) -> Tensor | None:
        self._check(view)
        self._evict(view)
        alive: Tensor | None = view.memory.pop("alive", None)
        if alive is None or bool(alive.all()):
            return None
        view.memory["sums"] = view.memory["sums"][alive].view(len(alive), -1)
        return alive

    def attended(self, weights: Tensor, groups: int, view: SequenceView) -> None:
        self._add(weights, groups, view, 1)

    def check_freeing(self) -> None:
        super().check_freeing()
        if self.budgets.even < 1:
            raise ValueError(
                f"{self.name}: budgets.even is {self.budgets.even}: memory is freed where the heads of a layer keep as "
                "many keys as each other: give it budgets with even=1"
            )

    def _check(self, view: SequenceView) -> None:
        check_whole_prompt(self.name, view, "sums" in view.memory, view.query_start)

    def _add(self, weights: Tensor, groups: int, view: SequenceView, n_queries: int) -> None:
        """weights: (H, keys), sums over the n_queries queries of this forward pass."""
        view.memory["tokens"] = view.memory.get("tokens", 0) + n_queries  # evicted ones included
        sums = self.budgets.scores(weights, groups)
        if "sums" in view.memory:
            sums = sums + _longer(view.memory["sums"], sums.shape[1], 0)
        view.memory["sums"] = sums

    def _evict(self, view: SequenceView) -> None:
        """Cuts memory["alive"], bool (heads, keys), down to the budget, by memory["sums"], (heads, keys)."""
        sums = view.memory["sums"]
        older, all_older = sums.shape[1] - self.recent, view.memory["tokens"] - self.recent
        if all_older <= self.heavy:
            return
        alive = _longer(view.memory.get("alive", torch.ones_like(sums[:, :0], dtype=torch.bool)), sums.shape[1], True)
        candidates = sums[:, :older].masked_fill(~alive[:, :older], -torch.inf)
        counts: int | Tensor = self.budgets.of_layer(self.heavy, all_older, view)
        if self.budgets.even < 1:
            if "heavy" not in view.memory:
                view.memory["heavy"] = self.budgets.counts(candidates, self.heavy, view)
            counts = view.memory["heavy"]
        alive[:, :older] = top_count(candidates, counts)
        view.memory["alive"] = alive


def _longer(x: Tensor, n_keys: int, value: float) -> Tensor:
    """(heads, n) -> (heads, n_keys), new."""
    return torch.nn.functional.pad(x, (0, n_keys - x.shape[1]), value=value)
