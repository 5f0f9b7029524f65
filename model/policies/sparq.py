"""SparQ: keys chosen by the query's largest channels; the mean value stands for the rest."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from model.policies.blocks import check_least, top_count
from model.policies.policy import Attended, Phase, SequenceView, SparsePolicy, masked_attention
from model.policies.selection import Selection, TokenSelection


@dataclass(frozen=True)
class SparQ(SparsePolicy):
    """Decoding attends to `keys` keys and its own (SparQ, arXiv:2312.04985, Algorithm 1): the last `local` of them, and
    those of largest score in the `channels` channels where the query is largest. Scores are divided by the root of
    these channels' share of the query's L1 norm. Heads that share keys choose together, by sums of |q| and of
    scores. Of the output the share of weight that the scores give the rest goes to the mean value of all visible keys.

    The density counts what scores read, channels / 2D of the visible keys (a key and its value are 2D numbers), and
    attention is dense where that and the keys are no less than all. Defaults: the authors' example. Simplified: the
    mean is computed anew, where the paper keeps it; keys are stored once, not by channel too. ALiBi's bias is added to
    the scores.
    """

    name: ClassVar[str] = "sparq"
    phases: ClassVar[frozenset[Phase]] = frozenset({"decode"})
    keys: int = 64
    channels: int = 16
    local: int = 16

    def __post_init__(self) -> None:
        check_least(1, keys=self.keys, channels=self.channels)
        check_least(0, local=self.local)
        if self.local > self.keys:
            raise ValueError(f"local is {self.local}: expected at most keys, {self.keys}, of which they are a part")

    def choose(self, q: Tensor, k: Tensor, view: SequenceView) -> tuple[Selection, int]:
        return self.select(q, k, view), self._reads(k, view)

    def _reads(self, k: Tensor, view: SequenceView) -> int:
        """What scores of all keys take, in pairs; 0 where that does not pay and all keys are read."""
        seen = k.shape[1] if view.window is None else min(k.shape[1], view.window)
        reads = -(-seen * min(self.channels, k.shape[2]) // (2 * k.shape[2]))
        return reads if self.keys + 1 + reads < seen else 0

    def select(self, q: Tensor, k: Tensor, view: SequenceView) -> Selection:
        if not self._reads(k, view):
            return TokenSelection(torch.ones(1, 1, k.shape[1], dtype=torch.bool, device=k.device))
        return TokenSelection(self._best(self.scores(q, k, view), len(k))[:, None])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, view: SequenceView) -> Attended:
        reads = self._reads(k, view)
        if not reads:
            return super().attend(q, k, v, view)
        scores = self.scores(q, k, view)
        chosen = self._best(scores, len(k))
        exact = masked_attention(q, k, v, view, TokenSelection(chosen[:, None]))
        share = (scores.softmax(-1) * chosen).sum(-1)[:, None, None]
        seen = view.visible(slice(0, 1), k.shape[1], q.device)[0]
        mean = v[:, seen].float().mean(1, keepdim=True).repeat_interleave(len(q) // len(v), 0)  # [H, 1, D]
        out = share * exact.out.float() + (1 - share) * mean
        return replace(exact, out=out.to(q.dtype), estimated=reads)

    def _best(self, scores: Tensor, groups: int) -> Tensor:
        """Bool (H, keys), which are attended. scores: (H, keys)."""
        together = scores.unflatten(0, (groups, -1)).sum(1)
        together[:, together.shape[1] - 1 - self.local :] = torch.inf
        return top_count(together, self.keys + 1).repeat_interleave(len(scores) // groups, 0)

    def scores(self, q: Tensor, k: Tensor, view: SequenceView) -> Tensor:
        """Estimated scores of one query, (H, 1, D): float32 (H, keys), -inf where not visible."""
        size = q.float().abs().unflatten(0, (len(k), -1))  # [G, H / G, 1, D]
        largest = top_count(size.sum(1), self.channels).repeat_interleave(len(q) // len(k), 0)
        part, least = q.float() * largest, torch.finfo(torch.float32).tiny
        share = part.abs().sum(-1, keepdim=True) / q.float().abs().sum(-1, keepdim=True).clamp(min=least)
        return view.scores(part / share.clamp(min=least).sqrt(), k, slice(0, 1), k.shape[1])[:, 0]
