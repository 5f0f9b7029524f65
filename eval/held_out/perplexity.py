"""Held-out loss at the training length and over context lengths, always on the same tokens.

A window reads tokens[start:stop] and predicts tokens[start + 1 : stop + 1], so every token after a document's first is
predicted exactly once whatever the window length: only how much context it sees differs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from eval.common.scoring import Context, LanguageModel, Runtime, Scores, score, shifted
from eval.held_out.config import EvalConfig


class Documents(Protocol):
    """What is read of a held-out split; data.store.TokenStore has it. Documents are <bos> ids <eos>."""

    @property
    def lengths(self) -> NDArray[np.int64]: ...

    @property
    def num_bytes(self) -> NDArray[np.int64]: ...

    def document(self, index: int) -> NDArray[np.int64]: ...


class TextCodec(Protocol):
    """What is read of a tokenizer; data.tokenizer.Tokenizer has it."""

    vocab_size: int
    bos_id: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def token_bytes(self, token: int) -> bytes: ...


def bytes_of_tokens(codec: TextCodec) -> NDArray[np.int64]:
    """UTF-8 bytes that each token adds to a text: int64 (V,), 0 for <bos>, <eos> and <unk>.

    Exact also where a window or a token cuts a character.
    """
    return np.array([len(codec.token_bytes(token)) for token in range(codec.vocab_size)], np.int64)


class TextBytes:
    """How many UTF-8 bytes of a split's texts tokens stand for.

    Args:
        token_bytes: What bytes_of_tokens gives for the split's tokenizer.
        lossy: The tokenizer changes texts, so its tokens have other bytes than they: a document has the bytes that its
            text had, and each token its share of them by the bytes of the tokens.
    """

    def __init__(self, store: Documents, token_bytes: NDArray[np.int64], lossy: bool) -> None:
        self.store, self.token_bytes, self.lossy = store, token_bytes, lossy

    def between(self, document: int, start: int, stop: int) -> int:
        """Bytes of tokens[start:stop] of a document. Those of its parts add up to those of the whole."""
        if not self.lossy:
            return int(self.token_bytes[self.store.document(document)[start:stop]].sum())
        ids = self.store.document(document)
        sizes = self.token_bytes[ids]
        if not sizes.any():  # nothing but <unk>
            sizes = np.ones(len(ids), np.int64)
        total, whole = int(self.store.num_bytes[document]), int(sizes.sum())
        before, behind = (total * int(sizes[:end].sum()) // whole for end in (start, stop))
        return behind - before


@dataclass(frozen=True)
class Window:
    """Inputs tokens[start:stop] of a document."""

    document: int
    start: int
    stop: int


@dataclass(frozen=True)
class PerplexityPlan:
    """What is scored, the same for every model.

    Args:
        base_length: Tokens of 1x.
        windows: Windows of the training length behind the headline, in document order.
        windows_total, tokens_total: What the whole split holds.
        documents: Documents scored at every length.
        multiples: Lengths that the split can measure.
        edges: (bins + 1,) position bins within the longest context, in tokens.
        notes: What could not be measured, for the report.
    """

    base_length: int
    windows: list[Window]
    windows_total: int
    tokens_total: int
    documents: list[int]
    multiples: list[int]
    edges: list[int]
    notes: list[str]


@dataclass(frozen=True)
class Sums:
    """Sums over scored tokens, one entry a document: loss in nats, scored tokens, UTF-8 bytes of their text."""

    documents: list[int]
    loss: list[float]
    tokens: list[int]
    bytes: list[int]


@dataclass(frozen=True)
class PerplexityResult:
    """Raw sums of one model; intervals are computed from them.

    Args:
        headline: Held-out text at the training length.
        by_length: multiple -> sums over `plan.documents`; tokens and bytes are the same for every multiple.
        position_loss: (documents, bins) loss in nats within the longest context.
        position_tokens: (bins,) scored tokens of each document in each bin.
    """

    headline: Sums
    by_length: dict[int, Sums]
    position_loss: list[list[float]]
    position_tokens: list[int]


def plan_perplexity(store: Documents, base_length: int, config: EvalConfig) -> PerplexityPlan:
    """Chooses windows and documents.

    Raises:
        ValueError: no document is long enough for even the shortest length.
    """
    lengths = np.asarray(store.lengths)
    windows = training_windows(lengths, base_length)
    multiples, notes = measurable_multiples(lengths, base_length, config)
    generator = np.random.default_rng([config.seed, 1])
    chosen = _sample_windows(windows, config.headline_tokens, generator)
    # A document needs one token beyond the longest context: the target of its last input.
    long_enough = np.flatnonzero(lengths > multiples[-1] * base_length)
    documents = sorted(generator.permutation(long_enough)[: config.max_documents].tolist())
    return PerplexityPlan(
        base_length=base_length,
        windows=chosen,
        windows_total=len(windows),
        tokens_total=int(np.maximum(lengths - 1, 0).sum()),
        documents=documents,
        multiples=multiples,
        edges=position_edges(multiples[-1] * base_length),
        notes=notes,
    )


def training_windows(lengths: NDArray[np.int64], base_length: int) -> list[Window]:
    """Windows of at most `base_length` inputs that predict every token after each document's first exactly once."""
    return [
        Window(document, start, min(start + base_length, int(length) - 1))
        for document, length in enumerate(lengths)
        for start in range(0, int(length) - 1, base_length)
    ]


def measurable_multiples(
    lengths: NDArray[np.int64], base_length: int, config: EvalConfig
) -> tuple[list[int], list[str]]:
    """The multiples of config.lengths that at least two documents reach, and a note for each one left out.

    Two documents are the least from which an interval over documents can be estimated.
    """
    longest, multiples = int(lengths.max(initial=0)), config.lengths
    kept = [m for m in multiples if int((lengths > m * base_length).sum()) >= 2]
    if not kept:
        raise ValueError(
            f"the held-out split has {int((lengths > multiples[0] * base_length).sum())} documents of more than "
            f"{multiples[0] * base_length} tokens ({multiples[0]}x): at least 2 are needed, and the longest document "
            f"has {longest}; hold out longer documents, or set smaller {config.option('lengths')} or a smaller "
            f"{config.option('base_length')}"
        )
    notes = [
        f"{m}x ({m * base_length} tokens) is not measured: fewer than 2 held-out documents are that long; the longest "
        f"has {longest} tokens."
        for m in multiples
        if m not in kept
    ]
    return kept, notes


def position_edges(longest: int) -> list[int]:
    """Edges of position bins over 0 ... longest: halves of the longest down to 16 tokens, so that each shorter context
    length is an edge where the multiples are powers of two."""
    edges = [longest]
    while edges[-1] >= 32:
        edges.append(edges[-1] // 2)
    return [0, *reversed(edges)]


def _sample_windows(windows: list[Window], most_tokens: int, generator: np.random.Generator) -> list[Window]:
    sizes = np.array([window.stop - window.start for window in windows])
    if not most_tokens or sizes.sum() <= most_tokens:
        return windows
    order = generator.permutation(len(windows))
    count = max(1, int(np.searchsorted(np.cumsum(sizes[order]), most_tokens, side="right")))
    return [windows[i] for i in sorted(order[:count].tolist())]


def length_windows(documents: Sequence[int], multiple: int, largest: int, base_length: int) -> list[Window]:
    """The first largest * base_length inputs of each document, cut into fresh contexts of multiple * base_length."""
    size = multiple * base_length
    return [
        Window(document, start, start + size)
        for document in documents
        for start in range(0, largest * base_length, size)
    ]


def measure_perplexity(
    model: LanguageModel,
    store: Documents,
    plan: PerplexityPlan,
    token_bytes: NDArray[np.int64],
    runtime: Runtime,
    label: str,
    *,
    lossy: bool = False,
) -> PerplexityResult:
    """Scores one model on the plan.

    Args:
        token_bytes, lossy: As in TextBytes.

    Raises:
        ValueError: a loss is not finite, or the tokens' bytes differ from what the split recorded.
    """
    scored = _score_windows(model, store, plan.windows, runtime, f"{label}: {plan.base_length} tokens, all text")
    text_bytes = TextBytes(store, token_bytes, lossy)
    headline = _headline_sums(store, plan.windows, scored, text_bytes)
    by_length: dict[int, Sums] = {}
    largest = plan.multiples[-1]
    total = largest * plan.base_length
    sizes = [text_bytes.between(document, 1, total + 1) for document in plan.documents]
    position_loss: list[list[float]] = []
    for multiple in plan.multiples:
        windows = length_windows(plan.documents, multiple, largest, plan.base_length)
        scored = _score_windows(model, store, windows, runtime, f"{label}: perplexity at {multiple}x")
        losses = np.concatenate([one.loss for one in scored]).reshape(len(plan.documents), total)
        by_length[multiple] = Sums(plan.documents, losses.sum(1).tolist(), [total] * len(plan.documents), sizes)
        if multiple == largest:
            position_loss = np.add.reduceat(losses, plan.edges[:-1], axis=1).tolist()
    return PerplexityResult(headline, by_length, position_loss, np.diff(plan.edges).tolist())


def _score_windows(
    model: LanguageModel, store: Documents, windows: Sequence[Window], runtime: Runtime, title: str
) -> list[Scores]:
    contexts: list[Context] = [shifted(store.document(w.document), w.start, w.stop) for w in windows]
    return score(model, contexts, runtime, title)


def _headline_sums(
    store: Documents, windows: Sequence[Window], scored: Sequence[Scores], text_bytes: TextBytes
) -> Sums:
    documents = sorted({window.document for window in windows})
    row = {document: i for i, document in enumerate(documents)}
    loss, tokens, sizes = [0.0] * len(documents), [0] * len(documents), [0] * len(documents)
    for window, one in zip(windows, scored, strict=True):
        i = row[window.document]
        loss[i] += float(one.loss.sum())
        tokens[i] += window.stop - window.start
        sizes[i] += text_bytes.between(window.document, window.start + 1, window.stop + 1)
    for document, i in row.items():
        covered, recorded = tokens[i] == int(store.lengths[document]) - 1, int(store.num_bytes[document])
        if covered and sizes[i] != recorded:
            raise ValueError(
                f"held-out document {document} has {sizes[i]} bytes by its tokens and {recorded} by the prepared "
                "split: the tokenizer does not match the shards; prepare the corpus again"
            )
    return Sums(documents, loss, tokens, sizes)
