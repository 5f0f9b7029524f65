"""Dual Chunk Attention: no rotary distance beyond those of the trained length, and nothing left out."""

from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from model.config import ModelConfig
from model.policies.blocks import check_least
from model.policies.policy import Attended, SequenceView, SparsePolicy, masked_attention
from model.policies.selection import Selection, TokenSelection
from model.policies.window import refuse_dynamic
from model.rotary import turned


@dataclass(frozen=True)
class DualChunk(SparsePolicy):
    """Dual Chunk Attention (arXiv:2402.17463), for rotary models beyond their trained length.

    Keys count within chunks of farthest - local tokens; a query meets those of a chunk from as far as it is from the
    first of them, but at most from `farthest`. So its own chunk and the `local` tokens before have their true
    distances, and none is above `farthest`. Each query sees all keys. Up to farthest + 1 tokens it is dense attention.

    farthest: below the trained length; at least 2 local. The logarithmic factor on scores that the authors' code has,
    and their paper does not, is left out.
    """

    name: ClassVar[str] = "dual_chunk"
    farthest: int
    local: int

    def __post_init__(self) -> None:
        check_least(1, local=self.local)
        check_least(2 * self.local, farthest=self.farthest)

    @classmethod
    def of_trained_length(cls, tokens: int) -> "DualChunk":
        """The authors' setting: no distance above 3/4 of the trained length, 1/8 of it true. Raises ValueError below 8
        tokens."""
        check_least(8, trained_length=tokens)
        return cls(tokens * 3 // 4, tokens // 8)

    def check(self, config: ModelConfig) -> None:
        if config.positions != "rope":
            raise ValueError(f"positions is {config.positions!r}: {self.name} changes rotary ones, and there are none")
        if config.window is not None:
            raise ValueError(f"window is {config.window}: {self.name} is for models that attend to the whole text")
        refuse_dynamic(self, config)

    def select(self, q: Tensor, k: Tensor, view: SequenceView) -> Selection:
        return TokenSelection(torch.ones(1, 1, k.shape[1], dtype=torch.bool, device=k.device))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, view: SequenceView) -> Attended:
        facts = {one.name: getattr(view, one.name) for one in fields(view)}
        view = _ChunkView(**facts, farthest=self.farthest, chunk=self.farthest - self.local)
        return masked_attention(q, k, v, view, self.select(q, k, view))


@dataclass(frozen=True, kw_only=True)
class _ChunkView(SequenceView):
    """A view whose scores are those of DualChunk. Keys stay as they are cached: queries are turned to where they have
    the wanted distance from a whole chunk of keys."""

    farthest: int
    chunk: int

    def scores(self, q: Tensor, k: Tensor, rows: slice, n_keys: int) -> Tensor:
        scores = q.new_full((len(q), rows.stop - rows.start, n_keys), -torch.inf, dtype=torch.float32)
        query = torch.arange(rows.start, rows.stop, device=q.device) + self.query_start
        for start in range(0, n_keys, self.chunk):
            keys = slice(start, min(start + self.chunk, n_keys))
            met_from = start + (query - start).clamp(max=self.farthest)
            part = turned(q[:, rows], query, met_from, self.frequencies).unflatten(0, (len(k), -1))
            scores[..., keys] = (part @ k[:, None, keys].float().transpose(-1, -2)).flatten(0, 1) * self.scale
        return scores.masked_fill_(~self.visible(rows, n_keys, q.device), -torch.inf)
