"""Properties of packing: pure, exact shares, every token once an epoch, labels and pieces as in the documents."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data.packing import IGNORED_LABEL, PackedSequence, Packing, bucket_totals
from data.permutation import Interleaving, permute

EXAMPLES = settings(max_examples=60)


@dataclass
class MemoryStore:
    """Documents by shard; every token of the store has a value of its own, from `first` on."""

    lengths: list[list[int]]
    first: int = 0
    offsets: list[NDArray[np.int64]] = field(init=False)
    tokens: list[NDArray[Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.offsets = [np.cumsum([0, *shard]).astype(np.int64) for shard in self.lengths]
        starts = np.cumsum([self.first] + [sum(shard) for shard in self.lengths])
        self.tokens = [np.arange(a, b, dtype=np.uint32) for a, b in zip(starts[:-1], starts[1:], strict=True)]

    @property
    def num_shards(self) -> int:
        return len(self.lengths)

    def shard_tokens(self, shard: int) -> NDArray[Any]:
        return self.tokens[shard]

    def shard_offsets(self, shard: int) -> NDArray[np.int64]:
        return self.offsets[shard]

    def documents(self) -> list[NDArray[np.int64]]:
        return [
            tokens[start:end].astype(np.int64)
            for tokens, offsets in zip(self.tokens, self.offsets, strict=True)
            for start, end in zip(offsets[:-1], offsets[1:], strict=True)
        ]


STORES = st.lists(st.lists(st.integers(1, 40), min_size=0, max_size=8), min_size=1, max_size=5).filter(
    lambda shards: sum(map(sum, shards)) >= 48
)
WEIGHTS = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=12)


def make_packing(store: MemoryStore, seed: int = 0, **options: Any) -> Packing:
    arguments: dict[str, Any] = {"sequence_length": 16, "intra_document": True, "weights": [1.0]}
    arguments |= {"length_buckets": [{0: 1.0}], "names": ["memory"]} | options
    return Packing([store], seed=seed, **arguments)


def epoch(packing: Packing, number: int) -> list[PackedSequence]:
    windows = packing.sequences_per_pass
    return [packing.sequence(i) for i in range(number * windows, (number + 1) * windows)]


def same(a: PackedSequence, b: PackedSequence) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@EXAMPLES
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation_at_any_single_place(size: int, key: int) -> None:
    images = permute(np.arange(size), size, key)
    assert sorted(images.tolist()) == list(range(size))
    places = np.array([size - 1, size // 2])
    assert np.array_equal(permute(places, size, key), images[places])


def test_permute_works_on_sizes_beyond_memory_and_depends_on_the_key() -> None:
    size = 10**13 + 7
    images = permute(np.arange(1000), size, key=1)
    assert len(set(images.tolist())) == 1000 and images.max() < size and images.std() > size / 5
    assert not np.array_equal(images, permute(np.arange(1000), size, key=2))


def test_permute_spreads_uniformly() -> None:
    counts = np.zeros((12, 12))
    for key in range(3000):
        counts[np.arange(12), permute(np.arange(12), 12, key)] += 1
    assert abs(counts - 250).max() < 5 * 250**0.5


@EXAMPLES
@given(weights=WEIGHTS, length=st.integers(1, 400))
def test_interleaving_keeps_every_stream_near_its_share_at_every_prefix(weights: list[float], length: int) -> None:
    interleaving = Interleaving(weights)
    total = sum(map(Fraction, weights))
    counts = [0] * len(weights)
    limit = 1 if len(weights) <= 3 else 2
    for i in range(length):
        stream, k = interleaving.locate(i)
        assert k == counts[stream]
        counts[stream] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - (i + 1) * Fraction(weight) / total) < limit


@EXAMPLES
@given(weights=WEIGHTS, index=st.integers(10**11, 10**12))
def test_interleaving_is_as_exact_after_a_trillion_sequences(weights: list[float], index: int) -> None:
    stream, k = Interleaving(weights).locate(index)
    assert abs(k - index * Fraction(weights[stream]) / sum(map(Fraction, weights))) < 2


@EXAMPLES
@given(shards=STORES, seed=st.integers(0, 2**40), order=st.randoms(use_true_random=False), masked=st.booleans())
def test_a_sequence_is_a_pure_function_of_seed_and_index(shards: Any, seed: int, order: Any, masked: bool) -> None:
    first = make_packing(MemoryStore(shards), seed, intra_document=masked)
    expected = [first.sequence(i) for i in range(30)]
    second = pickle.loads(pickle.dumps(make_packing(MemoryStore(shards), seed, intra_document=masked)))
    indices = list(range(30))
    order.shuffle(indices)
    assert all(same(second.sequence(i), expected[i]) for i in indices)


def test_seeds_and_epochs_give_different_orders() -> None:
    store = MemoryStore([[10] * 30, [7] * 40])
    orders = [
        tuple(int(sequence.tokens[0]) for sequence in epoch(make_packing(store, seed), number))
        for seed in (0, 1)
        for number in (0, 1)
    ]
    assert len(set(orders)) == 4


@EXAMPLES
@given(shards=STORES, seed=st.integers(0, 1000), number=st.integers(0, 3), masked=st.booleans())
def test_an_epoch_has_every_token_once_but_for_a_remainder(shards: Any, seed: int, number: int, masked: bool) -> None:
    store = MemoryStore(shards)
    packing = make_packing(store, seed, intra_document=masked)
    tokens = np.concatenate([sequence.tokens for sequence in epoch(packing, number)])
    total = sum(map(sum, shards))
    assert len(np.unique(tokens)) == len(tokens) == total - total % 16
    assert tokens.min() >= 0 and tokens.max() < total


@EXAMPLES
@given(shards=STORES, seed=st.integers(0, 1000))
def test_pieces_and_labels_are_those_of_the_documents(shards: Any, seed: int) -> None:
    store = MemoryStore(shards)
    next_token: dict[int, int] = {}
    document_of: dict[int, int] = {}
    for number, document in enumerate(store.documents()):
        next_token |= dict(zip(document.tolist(), [*document[1:].tolist(), IGNORED_LABEL], strict=True))
        document_of |= dict.fromkeys(document.tolist(), number)
    for sequence in epoch(make_packing(store, seed), 0):
        assert sequence.tokens.dtype == sequence.labels.dtype == np.int64
        assert sequence.lengths.sum() == 16 and sequence.lengths.min() >= 1
        assert sequence.labels.tolist() == [next_token[token] for token in sequence.tokens.tolist()]
        for piece in np.split(sequence.tokens, np.cumsum(sequence.lengths)[:-1]):
            assert np.array_equal(piece, np.arange(piece[0], piece[0] + len(piece)))  # consecutive in the document
            assert len({document_of[token] for token in piece.tolist()}) == 1
        firsts = np.split(sequence.tokens, np.cumsum(sequence.lengths)[:-1])
        owners = [document_of[int(piece[0])] for piece in firsts]
        assert len(set(owners)) == len(owners)  # a document is not split within a window


@EXAMPLES
@given(shards=STORES, seed=st.integers(0, 1000))
def test_without_masking_labels_cross_documents(shards: Any, seed: int) -> None:
    store = MemoryStore(shards)
    masked = epoch(make_packing(store, seed), 0)
    joined = epoch(make_packing(store, seed, intra_document=False), 0)
    first_tokens = {int(document[0]) for document in store.documents()}
    unlabelled = 0
    for a, b in zip(masked, joined, strict=True):
        assert np.array_equal(a.tokens, b.tokens) and b.lengths.tolist() == [16]
        assert np.array_equal(b.labels[:-1], b.tokens[1:])
        inside = a.labels != IGNORED_LABEL
        assert np.array_equal(a.labels[inside], b.labels[inside])
        crossing = b.labels[~inside]
        unlabelled += int((crossing == IGNORED_LABEL).sum())
        assert all(int(label) in first_tokens for label in crossing[crossing != IGNORED_LABEL])
    assert unlabelled <= 1  # only behind the last token of the line


def test_length_buckets_up_weight_the_tokens_of_long_documents() -> None:
    store = MemoryStore([[4] * 100, [20] * 30])  # 400 and 600 tokens
    for factor, share in ((1.0, 0.6), (2.0, 0.75)):
        packing = make_packing(store, length_buckets=[{0: 1.0, 8: factor}])
        drawn = Counter(packing.locate(i)[0] for i in range(1000))
        assert abs(drawn[1] / 1000 - share) < 0.002
        for i in range(100):
            is_long = (packing.sequence(i).tokens >= 400).all()
            assert is_long == bool(packing.locate(i)[0])
    only_long = make_packing(store, length_buckets=[{0: 0.0, 8: 1.0}])
    assert len(only_long.streams) == 1 and (only_long.sequence(3).tokens >= 400).all()


def test_source_weights_do_not_depend_on_the_sizes_of_the_sources() -> None:
    stores = [MemoryStore([[10] * 10]), MemoryStore([[10] * 100], first=100)]
    packing = Packing(
        stores,
        weights=[3.0, 1.0],
        length_buckets=[{0: 1.0}] * 2,
        names=["a", "b"],
        sequence_length=16,
        seed=0,
        intra_document=True,
    )
    from_first = sum(bool((packing.sequence(i).tokens < 100).all()) for i in range(400))
    assert from_first == 300


def test_bucket_totals_count_each_document_in_its_bucket() -> None:
    assert bucket_totals(MemoryStore([[3, 8, 7], [], [9]]), [0, 8]).tolist() == [[10, 8], [0, 0], [0, 9]]


@pytest.mark.parametrize(
    ("sequence_length", "buckets", "what"),
    [
        (24, {0: 1.0}, "0 <= tokens < infinity has 20 tokens"),
        (16, {0: 1.0, 100: 2.0}, "100 <= tokens < infinity has 0"),
    ],
)
def test_a_stream_shorter_than_one_sequence_is_refused(sequence_length: int, buckets: Any, what: str) -> None:
    store = MemoryStore([[10, 10]])
    with pytest.raises(ValueError, match=f"{what}.*fewer than one sequence of {sequence_length}"):
        make_packing(store, sequence_length=sequence_length, length_buckets=[buckets])


def test_passes_are_told_by_source_with_the_one_that_is_running() -> None:
    small, large = MemoryStore([[40, 40]]), MemoryStore([[400, 400]])
    packing = Packing(
        [small, large], weights=[1, 3], length_buckets=[{0: 1.0}, {0: 1.0}], names=["small", "large"],
        sequence_length=8, seed=0, intra_document=True,
    )  # fmt: skip
    assert packing.passes(40, 0) == []
    assert packing.passes(128, 0) == [
        "3.2 passes over documents of small with 0 <= tokens < infinity are planned; this is pass 1"
    ]
    assert packing.passes_done(0) == 0 and packing.passes_done(128) == pytest.approx(3.2)
    assert [line.rpartition(";")[2] for line in packing.passes(200, 120)] == [" this is pass 4", " this is pass 1"]
    first_of_pass = next(i for i in range(1000) if packing.locate(i) == (0, 30))
    assert packing.passes(128, first_of_pass + 1)[0].endswith("this is pass 4")
