"""Token losses and greedy hits of many contexts, packed into rows of bounded length."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

# Float32 logits alive at once: 2**24 of them are 64 MiB.
LOGITS_AT_ONCE = 2**24


def nothing() -> None:
    """Nobody asks how far the work is."""


class NotFinite(ValueError):
    """A model gives a loss that is not finite: it diverged."""


class LanguageModel(Protocol):
    """What scoring needs of a model; model.transformer.Transformer has it."""

    def __call__(self, tokens: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor:
        """tokens int64 (1, T), cu_seqlens int32 (contexts + 1,) -> hidden states (1, T, C)."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) -> logits (..., V)."""
        ...


@dataclass(frozen=True)
class Context:
    """One context that starts fresh.

    Args:
        tokens: int64 (T,), what the model reads.
        targets: int64 (T,), the token that follows each of them; -100 where nothing is scored.
    """

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]


@dataclass(frozen=True)
class Scores:
    """Scores of one context at its scored positions, in order: loss float64 (n,) in nats, hit bool (n,)."""

    loss: NDArray[np.float64]
    hit: NDArray[np.bool_]


@dataclass(frozen=True)
class Runtime:
    """Where and how a model runs.

    Args:
        autocast: Dtype of mixed precision, None for float32 throughout.
        row_tokens: Most tokens packed into one forward pass.
        done: Called after every forward pass, which is the longest that an evaluation says nothing of itself.
    """

    device: torch.device
    autocast: torch.dtype | None
    row_tokens: int
    done: Callable[[], None] = nothing

    def precision(self) -> AbstractContextManager:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)


def shifted(tokens: NDArray[np.int64], start: int, stop: int) -> Context:
    """The context that reads tokens[start:stop] and predicts tokens[start + 1 : stop + 1]."""
    if not 0 <= start < stop < len(tokens):
        raise ValueError(f"window {start}:{stop} of {len(tokens)} tokens: its last token needs a successor")
    return Context(tokens[start:stop].astype(np.int64), tokens[start + 1 : stop + 1].astype(np.int64))


def pack_rows(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Indices of contexts grouped, in order, into rows of at most `row_tokens`; a longer one has its own row."""
    rows: list[list[int]] = []
    used = 0
    for index, length in enumerate(lengths):
        if not rows or used + length > row_tokens:
            rows.append([])
            used = 0
        rows[-1].append(index)
        used += length
    return rows


def score(
    model: LanguageModel, contexts: Sequence[Context], runtime: Runtime, progress: str | None = None
) -> list[Scores]:
    """Scores every context on its own, several to a forward pass.

    Args:
        progress: Title of the progress bar; None for no bar.

    Raises:
        NotFinite: a loss is not finite.
    """
    lengths = [len(context.tokens) for context in contexts]
    scores: list[Scores] = []
    options: dict[str, Any] = dict(
        desc=progress, unit="tok", unit_scale=True, leave=False, delay=1, disable=progress is None
    )
    with tqdm(total=sum(lengths), **options) as bar:
        for row in pack_rows(lengths, runtime.row_tokens):
            scores.extend(_score_row(model, [contexts[i] for i in row], runtime))
            bar.update(sum(lengths[i] for i in row))
            runtime.done()
    return scores


@torch.no_grad()
def _score_row(model: LanguageModel, contexts: list[Context], runtime: Runtime) -> list[Scores]:
    ends = np.cumsum([0] + [len(context.tokens) for context in contexts])
    tokens = torch.from_numpy(np.concatenate([context.tokens for context in contexts])).to(runtime.device)
    targets = torch.from_numpy(np.concatenate([context.targets for context in contexts])).to(runtime.device)
    cu_seqlens = torch.from_numpy(ends.astype(np.int32)).to(runtime.device)
    scored = (targets >= 0).nonzero().squeeze(1)  # (n,)
    with runtime.precision():
        hidden = model(tokens[None], cu_seqlens, int(np.diff(ends).max()))[0]  # (T, C)
        loss, hit = _chunked_head(model, hidden[scored], targets[scored])
    owner = np.searchsorted(ends, scored.cpu().numpy(), side="right") - 1
    cuts = np.searchsorted(owner, np.arange(1, len(contexts)))
    parts = zip(np.split(loss, cuts), np.split(hit, cuts), strict=True)
    return [Scores(part_loss, part_hit) for part_loss, part_hit in parts]


def _chunked_head(
    model: LanguageModel, hidden: Tensor, targets: Tensor
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    losses, hits = [], []
    start = 0
    chunk = 1  # the vocabulary size is not known before the first logits
    while start < len(targets):
        logits = model.logits(hidden[start : start + chunk]).float()  # (n, V)
        wanted = targets[start : start + chunk]
        losses.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
        hits.append(logits.argmax(-1) == wanted)
        start += chunk
        chunk = max(1, LOGITS_AT_ONCE // logits.shape[-1])
    if not losses:
        return np.zeros(0), np.zeros(0, bool)
    loss = torch.cat(losses).double().cpu().numpy()
    if not np.isfinite(loss).all():
        raise NotFinite(
            f"the model gives a loss of {loss[~np.isfinite(loss)][0]} on held-out text: it diverged; evaluate an "
            "earlier checkpoint"
        )
    return loss, torch.cat(hits).cpu().numpy()
