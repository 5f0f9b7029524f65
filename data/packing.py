"""Packing: sequence i of the run is a pure function of the seed and i. numpy only, no state.

A *stream* is the documents of one source whose length falls in one bucket. `Interleaving` says which stream gives
sequence i and the how-manieth of that stream it is. A stream goes through its documents in epochs: the shards and the
documents of each shard are put in an order of that epoch and laid end to end; this line of tokens is cut in windows of
`sequence_length` (greedy packing: no padding, a document cut by a window's edge goes on in another window), and the
windows are visited in an order of that epoch. What remains at the line's end, less than a window, is left out of that
epoch. All orders are keyed permutations that are evaluated at single places, so random access costs O(1) memory and one
shard's offsets.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from data.permutation import Interleaving, derive_key, permute

IGNORED_LABEL = -100
CACHED_SHARDS = 64  # orders of documents kept per stream: about 1 MB each at 64K documents a shard


class Sequences(Protocol):
    """What a data module needs of the sequences of a run; `Packing` has it."""

    @property
    def sequence_length(self) -> int:
        """Tokens of each sequence."""
        ...

    @property
    def sequences_per_pass(self) -> int:
        """Sequences until everything there is has been seen once."""
        ...

    def document_lengths(self, indices: Sequence[int]) -> list[NDArray[np.int64]]:
        """(pieces,) for each: PackedSequence.lengths of these sequences, without reading their tokens."""
        ...

    def sequence(self, index: int) -> PackedSequence:
        """Sequence `index` >= 0; the same for every process, access order and number of workers."""
        ...


class DocumentShards(Protocol):
    """What packing needs of a corpus; data.store.TokenStore has it."""

    @property
    def num_shards(self) -> int: ...
    def shard_tokens(self, shard: int) -> NDArray[Any]: ...
    def shard_offsets(self, shard: int) -> NDArray[np.int64]: ...


class Piece(NamedTuple):
    """Tokens [start, end) of a document of `length` tokens, which is number `document` of the shard."""

    shard: int
    document: int
    start: int
    end: int
    length: int


class ShardOrder(NamedTuple):
    """Documents of a shard in the order of an epoch. starts: (n + 1,) int64, where each begins on the shard's line."""

    documents: NDArray[np.int64]
    starts: NDArray[np.int64]


class Stream:
    """Windows of `sequence_length` tokens from the documents of `store` with lower <= length < upper.

    shard_totals: (shards,) int64, tokens of those documents per shard (see `bucket_totals`). seed, stream: integers.
    Raises ValueError when there are fewer tokens than one window; `name` says which documents these are.
    """

    def __init__(
        self,
        store: DocumentShards,
        shard_totals: NDArray[np.int64],
        *,
        lower: int,
        upper: int | None,
        sequence_length: int,
        seed: int,
        stream: int,
        name: str,
    ) -> None:
        self.store = store
        self.shard_totals = shard_totals
        self.lower, self.upper = lower, upper
        self.name = name
        self.sequence_length = sequence_length
        self.seed, self.stream = seed, stream
        self.num_tokens = int(shard_totals.sum())
        self.windows_per_epoch = self.num_tokens // sequence_length
        if self.windows_per_epoch == 0:
            raise ValueError(
                f"{name} has {self.num_tokens} tokens, fewer than one sequence of {sequence_length}; "
                "use a shorter sequence_length, other length_buckets or more text"
            )
        self._make_caches()

    def _make_caches(self) -> None:
        self._cached_shard_line = functools.lru_cache(4)(self._shard_line)
        self._cached_shard_order = functools.lru_cache(CACHED_SHARDS)(self._shard_order)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_cached_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_caches()

    def _shard_line(self, epoch: int) -> ShardOrder:
        """Shards in the order of the epoch, and where each begins on the line of tokens."""
        count = len(self.shard_totals)
        shards = permute(np.arange(count), count, derive_key(self.seed, self.stream, epoch, 0))
        return ShardOrder(shards, np.concatenate([[0], np.cumsum(self.shard_totals[shards])]))

    def _shard_order(self, epoch: int, shard: int) -> ShardOrder:
        lengths = np.diff(self.store.shard_offsets(shard))
        chosen = np.flatnonzero((lengths >= self.lower) & (lengths < (self.upper or np.iinfo(np.int64).max)))
        order = permute(np.arange(len(chosen)), len(chosen), derive_key(self.seed, self.stream, epoch, 1, shard))
        documents = chosen[order]
        return ShardOrder(documents, np.concatenate([[0], np.cumsum(lengths[documents])]))

    def pieces(self, index: int, extra: int) -> list[Piece]:
        """Documents and parts of documents in window `index` (0, 1, ... over all epochs) and `extra` tokens behind it.

        There are no extra tokens behind the last token of the epoch's line.
        """
        epoch, visit = divmod(index, self.windows_per_epoch)
        return self._pieces_of_window(epoch, self._windows(epoch, [visit])[0], extra)

    def document_lengths(self, indices: Sequence[int]) -> list[NDArray[np.int64]]:
        """(pieces,) int64 for each window: tokens of its documents. The windows' order, which takes most of the time,
        is evaluated for all at once."""
        found: dict[int, NDArray[np.int64]] = {}
        for epoch in {index // self.windows_per_epoch for index in indices}:
            of_epoch = [index for index in indices if index // self.windows_per_epoch == epoch]
            for index, window in zip(
                of_epoch, self._windows(epoch, [index % self.windows_per_epoch for index in of_epoch]), strict=True
            ):
                found[index] = _lengths(self._pieces_of_window(epoch, window, 0))
        return [found[index] for index in indices]

    def _windows(self, epoch: int, visits: Sequence[int]) -> list[int]:
        """Places on the line of windows by their turn in the epoch."""
        key = derive_key(self.seed, self.stream, epoch, 2)
        return permute(np.array(visits), self.windows_per_epoch, key).tolist()

    def _pieces_of_window(self, epoch: int, window: int, extra: int) -> list[Piece]:
        begin = window * self.sequence_length
        end = min(begin + self.sequence_length + extra, self.num_tokens)
        line = self._cached_shard_line(epoch)
        place = int(np.searchsorted(line.starts, begin, side="right")) - 1
        pieces: list[Piece] = []
        while begin < end:
            shard_begin, shard_end = int(line.starts[place]), int(line.starts[place + 1])
            if shard_begin < shard_end:  # else: a shard without documents of this bucket
                stop = min(end, shard_end)
                pieces += self._pieces_of_shard(
                    epoch, int(line.documents[place]), begin - shard_begin, stop - shard_begin
                )
                begin = stop
            place += 1
        return pieces

    def _pieces_of_shard(self, epoch: int, shard: int, begin: int, end: int) -> list[Piece]:
        """Pieces of tokens [begin, end) of the shard's line."""
        order = self._cached_shard_order(epoch, shard)
        first = int(np.searchsorted(order.starts, begin, side="right")) - 1
        last = int(np.searchsorted(order.starts, end, side="left"))
        pieces = []
        for document, start, stop in zip(
            order.documents[first:last].tolist(),
            order.starts[first:last].tolist(),
            order.starts[first + 1 : last + 1].tolist(),
            strict=True,
        ):
            pieces.append(Piece(shard, document, max(begin - start, 0), min(end, stop) - start, stop - start))
        return pieces

    def read(self, piece: Piece) -> NDArray[np.int64]:
        """(end - start,) int64 tokens of the piece, and the document's next one if there is one."""
        start = int(self.store.shard_offsets(piece.shard)[piece.document])
        tokens = self.store.shard_tokens(piece.shard)[start + piece.start : start + min(piece.end + 1, piece.length)]
        return tokens.astype(np.int64)


class PackedSequence(NamedTuple):
    """tokens, labels: (sequence_length,) int64. lengths: (pieces,) int64, tokens of each attention document."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    lengths: NDArray[np.int64]


def _lengths(pieces: Sequence[Piece]) -> NDArray[np.int64]:
    return np.array([piece.end - piece.start for piece in pieces], np.int64)


def bucket_totals(store: DocumentShards, bounds: Sequence[int]) -> NDArray[np.int64]:
    """(shards, buckets) int64: tokens of the documents of each length bucket; bucket j starts at bounds[j]."""
    if list(bounds) == [0]:  # spares reading the offsets of every document
        return np.array([[store.shard_offsets(shard)[-1]] for shard in range(store.num_shards)], np.int64)
    totals = np.zeros((store.num_shards, len(bounds)), np.int64)
    for shard in range(store.num_shards):
        lengths = np.diff(store.shard_offsets(shard))
        buckets = np.searchsorted(bounds, lengths, side="right") - 1
        inside = buckets >= 0
        np.add.at(totals[shard], buckets[inside], lengths[inside])
    return totals


class Packing:
    """The sequences of a run, over one or more sources.

    stores, weights, length_buckets, names: one entry per source. A source gets weight / sum(weights) of the sequences
    (hence of the tokens), whatever its size. length_buckets maps the lower bound of each bucket (tokens with bos and
    eos, {0: 1.0} for one bucket) to a factor: within a source, a bucket gets a share proportional to factor x its
    tokens, so equal factors keep the natural mixture, and factor 2 shows each token of the bucket twice as often as
    factor 1. Factor 0 leaves the documents of that bucket out.
    intra_document: True makes every document piece an attention document of its own, whose labels are the next tokens
    of the same document, also across the window's edge, and -100 at its end. False makes the window one attention
    document whose labels are the next tokens on the line, across documents; only an epoch's last token has none.
    Raises ValueError for a bucket with a factor but fewer tokens than one sequence.
    """

    def __init__(
        self,
        stores: Sequence[DocumentShards],
        *,
        weights: Sequence[float],
        length_buckets: Sequence[Mapping[int, float]],
        names: Sequence[str],
        sequence_length: int,
        seed: int,
        intra_document: bool,
    ) -> None:
        self.sequence_length = sequence_length
        self.intra_document = intra_document
        self.streams: list[Stream] = []
        self.shares: list[Fraction] = []  # of the sequences, by stream
        total_weight = sum(Fraction(weight) for weight in weights)
        for source, (store, weight, buckets) in enumerate(zip(stores, weights, length_buckets, strict=True)):
            bounds = sorted(buckets)
            totals = bucket_totals(store, bounds)
            masses = [Fraction(buckets[bound]) * int(totals[:, j].sum()) for j, bound in enumerate(bounds)]
            for j, bound in enumerate(bounds):
                if buckets[bound] == 0:
                    continue
                upper = bounds[j + 1] if j + 1 < len(bounds) else None
                stream = Stream(
                    store,
                    totals[:, j].copy(),
                    lower=bound,
                    upper=upper,
                    sequence_length=sequence_length,
                    seed=seed,
                    stream=derive_key(source, bound) >> 1,
                    name=f"documents of {names[source]} with {bound} <= tokens < {upper or 'infinity'}",
                )
                self.streams.append(stream)
                self.shares.append(Fraction(weight) / total_weight * masses[j] / sum(masses))
        self._interleaving = Interleaving(self.shares)

    @property
    def sequences_per_pass(self) -> int:
        """Sequences of one epoch of every stream, added up."""
        return sum(stream.windows_per_epoch for stream in self.streams)

    def passes(self, sequences: int, consumed: int) -> list[str]:
        """A line for each stream that a run of `sequences` goes through more than once: how many times, and in which
        pass sequence `consumed` is."""
        lines = []
        for stream, share in zip(self.streams, self.shares, strict=True):
            planned = float(share * sequences / stream.windows_per_epoch)
            current = int(share * consumed / stream.windows_per_epoch) + 1
            if planned > 1:
                lines.append(f"{planned:.3g} passes over {stream.name} are planned; this is pass {current}")
        return lines

    def passes_done(self, consumed: int) -> float:
        """Passes behind `consumed` sequences, of the documents that come round most often."""
        return max(
            float(share * consumed / stream.windows_per_epoch)
            for stream, share in zip(self.streams, self.shares, strict=True)
        )

    def locate(self, index: int) -> tuple[int, int]:
        """(stream, k) of sequence `index` of the run."""
        return self._interleaving.locate(index)

    def document_lengths(self, indices: Sequence[int]) -> list[NDArray[np.int64]]:
        """(pieces,) of each sequence, without reading its tokens."""
        if not self.intra_document:
            return [np.array([self.sequence_length], np.int64)] * len(indices)
        places = [self.locate(index) for index in indices]
        found: dict[tuple[int, int], NDArray[np.int64]] = {}
        for number, stream in enumerate(self.streams):
            ks = [k for where, k in places if where == number]
            found |= zip([(number, k) for k in ks], stream.document_lengths(ks), strict=True)
        return [found[place] for place in places]

    def sequence(self, index: int) -> PackedSequence:
        """Sequence `index` >= 0 of the run; the same for every process, access order and number of workers."""
        number, k = self.locate(index)
        stream = self.streams[number]
        return self._masked(stream, k) if self.intra_document else self._joined(stream, k)

    def _masked(self, stream: Stream, k: int) -> PackedSequence:
        pieces = stream.pieces(k, extra=0)
        tokens = np.empty(self.sequence_length, np.int64)
        labels = np.full(self.sequence_length, IGNORED_LABEL, np.int64)
        position = 0
        for piece in pieces:
            ids, size = stream.read(piece), piece.end - piece.start
            tokens[position : position + size] = ids[:size]
            labels[position : position + len(ids) - 1] = ids[1:]
            position += size
        return PackedSequence(tokens, labels, _lengths(pieces))

    def _joined(self, stream: Stream, k: int) -> PackedSequence:
        line = np.concatenate([stream.read(p)[: p.end - p.start] for p in stream.pieces(k, extra=1)])
        labels = np.full(self.sequence_length, IGNORED_LABEL, np.int64)
        labels[: len(line) - 1] = line[1:]
        size = self.sequence_length
        return PackedSequence(line[:size], labels, np.array([size], np.int64))
