"""LM-Infinite: sinks and a window, and no distance beyond it."""

from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from model.config import ModelConfig
from model.policies.blocks import check_least
from model.policies.policy import Attended, SequenceView, SparsePolicy, masked_attention
from model.policies.selection import Selection
from model.policies.window import NearKeys, places, refuse_dynamic
from model.rotary import turned


@dataclass(frozen=True)
class LMInfinite(SparsePolicy):
    """Each query sees the `size` keys that end with its own, at their distance, and the first `sinks` keys of its
    sequence, at a distance of at most `size` (LM-Infinite, arXiv:2308.16137): rotary queries are turned to
    position `size` and the sinks to 0, ALiBi's bias stays at that distance. Dense up to size tokens; not beyond, where
    distances change. Sinks: the paper's 10 to 100.

    Left out: the best keys between the two, which the paper adds to some layers.
    """

    name: ClassVar[str] = "lm_infinite"
    size: int
    sinks: int = 10

    def __post_init__(self) -> None:
        check_least(1, size=self.size)
        check_least(0, sinks=self.sinks)

    def check(self, config: ModelConfig) -> None:
        refuse_dynamic(self, config)

    def select(self, q: Tensor, k: Tensor, view: SequenceView) -> Selection:
        return NearKeys(view, self.sinks, self.size, q.device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, view: SequenceView) -> Attended:
        facts = {one.name: getattr(view, one.name) for one in fields(view)}
        return masked_attention(q, k, v, _NearView(**facts, size=self.size, sinks=self.sinks), self.select(q, k, view))


@dataclass(frozen=True, kw_only=True)
class _NearView(SequenceView):
    """A view whose first `sinks` keys are nowhere farther away than `size`."""

    size: int
    sinks: int

    def scores(self, q: Tensor, k: Tensor, rows: slice, n_keys: int) -> Tensor:
        scores = super().scores(q, k, rows, n_keys)
        n_sinks = min(n_keys, self.sinks)  # what a window hides of them, or has cut, attention leaves out all the same
        query, key = places(self, rows, n_sinks, q.device)
        part = turned(q[:, rows], query[:, 0], self.size, self.frequencies).unflatten(0, (len(k), -1))
        sinks = turned(k[:, :n_sinks], key, 0, self.frequencies)[:, None]
        near = (part @ sinks.transpose(-1, -2)).flatten(0, 1) * self.scale  # [H, rows, sinks]
        if self.alibi_slopes is not None:
            near -= self.alibi_slopes[:, None, None] * self.size
        far = query - key >= self.size
        scores[..., :n_sinks] = torch.where(far, near, scores[..., :n_sinks])
        return scores
