"""Twilight: of what another policy selects, only the keys that hold most of its weight."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from model.config import ModelConfig
from model.policies.blocks import check_least, check_share, top_share
from model.policies.policy import Phase, SequenceView, SparsePolicy
from model.policies.selection import Selection, TokenSelection


@dataclass(frozen=True)
class Twilight(SparsePolicy):
    """Decoding attends to the fewest keys that hold `share` of the weight among those that `base` selects (Twilight,
    arXiv:2502.02770), each query head for itself. The weights that decide are of keys in 4 bits, between
    the least and the largest of their channels; attention over the keys is exact. Everything in the first
    `dense_layers` layers. At share 1 what base selects.

    base: chooses at every token anew; the paper's is Quest with 8,192 keys. The density counts what deciding reads: an
    eighth of base's keys (a quarter of the keys, no values), and what base itself counts. Simplified: keys are put into
    4 bits anew at each step, where the paper stores them so.
    """

    name: ClassVar[str] = "twilight"
    phases: ClassVar[frozenset[Phase]] = frozenset({"decode"})
    base: SparsePolicy
    share: float = 0.85
    dense_layers: int = 2

    def __post_init__(self) -> None:
        check_share(share=self.share)
        check_least(0, dense_layers=self.dense_layers)
        check_selector(self.base)

    def check(self, config: ModelConfig) -> None:
        self.base.check(config)

    def select(self, q: Tensor, k: Tensor, view: SequenceView) -> Selection:
        return self.choose(q, k, view)[0]

    def choose(self, q: Tensor, k: Tensor, view: SequenceView) -> tuple[Selection, Tensor | int]:
        rows, n_keys = slice(0, 1), k.shape[1]
        if view.layer < self.dense_layers:
            return TokenSelection(torch.ones(1, 1, n_keys, dtype=torch.bool, device=k.device)), 0
        seen = view.visible(rows, n_keys, k.device)
        base, read = self.base.choose(q, k, view)
        chosen = (base.mask(rows, n_keys) & seen).expand(len(q), -1, -1)
        if self.share == 1:
            return TokenSelection(chosen), read
        scores = view.scores(q, in_four_bits(k), rows, n_keys).masked_fill_(~chosen, -torch.inf)
        kept = top_share(scores.softmax(-1), self.share) & chosen
        return TokenSelection(kept), read + (chosen.sum((1, 2)) + 7) // 8  # a quarter of the key, half of a pair


def in_four_bits(x: Tensor) -> Tensor:
    """x with the last dimension's entries rounded to 16 evenly spaced values from its least to its largest, float32."""
    least, largest = x.float().aminmax(dim=-1, keepdim=True)
    step = ((largest - least) / 15).clamp(min=torch.finfo(torch.float32).tiny)
    return ((x.float() - least) / step).round() * step + least


def check_selector(base: SparsePolicy) -> None:
    """Raises ValueError for a policy that does not choose keys for each decoded token anew."""
    if "decode" not in base.phases or base.remembers:
        raise ValueError(f"base is {base.name}: expected a policy that chooses keys of every token anew, as Quest does")
