"""Policies that look at positions only."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from model.config import ModelConfig
from model.policies.policy import SequenceView, SparsePolicy
from model.policies.selection import Selection


def places(view: SequenceView, rows: slice, n_keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions in the sequence of queries `rows`, int64 (rows, 1), and of the first n_keys keys, int64 (n_keys,)."""
    query = torch.arange(rows.start, rows.stop, device=device) + view.query_start + view.key_start
    return query[:, None], torch.arange(n_keys, device=device) + view.key_start


def refuse_dynamic(policy: SparsePolicy, config: ModelConfig) -> None:
    """Raises ValueError where rotary angles grow with the text, so that nothing can be turned to another position."""
    if config.rope_scaling is not None and config.rope_scaling.kind == "dynamic":
        raise ValueError(f"rope_scaling.kind is 'dynamic': {policy.name} needs angles that do not change with the text")


@dataclass(frozen=True)
class NearKeys:
    """The first `sinks` keys of the sequence, and of each query the `size` keys that end with its own; numbers of all
    heads, or int64 (H,)."""

    view: SequenceView
    sinks: int | Tensor
    size: int | Tensor
    device: torch.device

    def mask(self, rows: slice, n_keys: int) -> Tensor:
        query, key = places(self.view, rows, n_keys, self.device)
        sinks, size = (n if isinstance(n, int) else n[:, None, None] for n in (self.sinks, self.size))
        return ((query - key)[None] < size) | (key < sinks)


@dataclass(frozen=True)
class SlidingWindow(SparsePolicy):
    """Each query sees the `size` keys that end with its own (Longformer's local attention, arXiv:2004.05150, causal;
    Mistral 7B, arXiv:2310.06825). Dense from size = T on."""

    name: ClassVar[str] = "window"
    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}: expected a window of at least 1 key")

    def select(self, q: Tensor, k: Tensor, view: SequenceView) -> Selection:
        return NearKeys(view, 0, self.size, q.device)


@dataclass(frozen=True)
class StreamingLLM(SparsePolicy):
    """Attention sinks and a sliding window (StreamingLLM, arXiv:2309.17453): each query sees the first `sinks` keys of
    its sequence and the `size` that end with its own. Dense from size = T on.

    Simplified: positions are those in the text. The paper counts them within what the cache keeps, which matters
    beyond the training length.
    """

    name: ClassVar[str] = "streaming_llm"
    sinks: int
    size: int

    def __post_init__(self) -> None:
        if self.size < 1 or self.sinks < 0:
            raise ValueError(f"sinks, size are {self.sinks}, {self.size}: expected at least 0 and 1 keys")

    def select(self, q: Tensor, k: Tensor, view: SequenceView) -> Selection:
        return NearKeys(view, self.sinks, self.size, q.device)
