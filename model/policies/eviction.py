"""What policies share that keep a part of the keys and evict the rest: how many keys layers and heads get, and what a
cache that frees memory asks of them (model/inference/evicting.py)."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from model.policies.blocks import check_least, check_share, top_count
from model.policies.policy import Phase, SequenceView, SparsePolicy


@dataclass(frozen=True)
class Budgets:
    """How the layers of a model and the heads of a layer share what each of them may keep.

    beta: None for all layers alike. Else budgets fall linearly from the first layer to the last, which gets 1 / beta of
        the mean (PyramidKV, arXiv:2406.02069). No layer gets more than there is; what the first ones
        cannot use goes to the last ones. Steps are rounded so that the layers' sum stays what it is, where the authors'
        code rounds every step down and keeps a tenth more at small budgets.
    even: share of a layer's budget that its heads get alike. Each has of the rest what it has among the largest scores
        of all heads together (Ada-KV, arXiv:2407.11550, Algorithm 1). 1 for all heads alike.
    grouped: query heads that share keys have one score, the mean of theirs, and so evict the same keys; else each
        chooses for itself, and memory is freed only of what none of them keeps.

    Raises: ValueError for a beta below 1 or an even share outside (0, 1].
    """

    beta: int | None = None
    even: float = 1.0
    grouped: bool = True

    def __post_init__(self) -> None:
        check_least(1, beta=1 if self.beta is None else self.beta)
        check_share(even=self.even)

    def scores(self, weights: Tensor, groups: int) -> Tensor:
        """Weights of each query head, (H, keys), -> of the heads that choose: (groups, keys) where grouped, else
        (H, keys)."""
        return weights.unflatten(0, (groups, -1)).mean(1) if self.grouped else weights

    def counts(self, scores: Tensor, each: int, view: SequenceView) -> Tensor:
        """int64 (heads,): how many keys each head of a layer keeps. scores: (heads, keys) of those to choose from.
        each: of a head, on average over layers and heads."""
        each = self.of_layer(each, scores.shape[1], view)
        alike = torch.full(scores.shape[:1], each, device=scores.device)
        if self.even == 1:
            return alike
        among_all = top_count(scores.flatten(), each * len(scores)).view_as(scores).sum(-1)
        return (self.even * alike + (1 - self.even) * among_all).round().long()

    def of_layer(self, each: int, n_keys: int, view: SequenceView) -> int:
        """How many of n_keys keys a head of this layer keeps on average. Each further key adds at most one, so that a
        growing text asks for nothing that was evicted."""
        if self.beta is None or each >= n_keys or view.n_layers == 1:
            return each
        most = min(2 * each - each // self.beta, n_keys)
        from_end = min(view.layer, view.n_layers - 1 - view.layer)  # such a pair of layers keeps 2 * each
        early = most - from_end * 2 * (most - each) // (view.n_layers - 1)
        return early if from_end == view.layer else 2 * each - early


class EvictingPolicy(SparsePolicy):
    """A policy whose decoding never sees again what it has once left out.

    weighs: it needs the attention weights of every token that is decoded.
    """

    phases: ClassVar[frozenset[Phase]] = frozenset({"decode"})
    remembers: ClassVar[bool] = True
    weighs: ClassVar[bool] = False
    budgets: Budgets

    @abstractmethod
    def evict(self, k: Tensor, view: SequenceView) -> Tensor | None:
        """Before a token that is decoded: bool (heads that choose, or 1, keys), which of the keys held so far stay;
        None for all. What view.memory has of keys is of these alone from then on. k: (G, keys, D), those held."""

    def attended(self, weights: Tensor, groups: int, view: SequenceView) -> None:  # noqa: B027
        """Told of a decoded token's attention weights, float32 (H, keys held and its own), where it weighs."""

    def check_freeing(self) -> None:
        """Raises ValueError where what it evicts could not be freed."""
        if not self.budgets.grouped:
            raise ValueError(
                f"{self.name}: budgets.grouped is False, so that query heads that share keys evict different ones and "
                "little can be freed: give it budgets with grouped=True"
            )


def of_query_heads(kept: Tensor, heads: int) -> Tensor:
    """(heads that choose, keys) -> (H, keys), where heads is H."""
    return kept.repeat_interleave(heads // len(kept), 0)


def check_whole_prompt(name: str, view: SequenceView, n_seen: int, n_keys: int) -> None:
    """Raises ValueError where a window has cut keys off, or keys are there of which the policy has seen none."""
    if view.key_start:
        raise ValueError(f"{name} chooses from whole prompts: not from a cache that a window has cut")
    if n_keys and not n_seen:
        raise ValueError(f"{name} has seen no prompt: start under the policy with an empty cache")
