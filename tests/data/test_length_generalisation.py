"""The tasks against plain definitions of their own, and as the content of a data module."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.datamodule import PackedDataModule, SourceConfig
from data.length_generalisation import (
    SPLITS,
    TASKS,
    Sample,
    Task,
    TaskConfig,
    TaskName,
    TaskSequences,
    draw,
    draw_distinct,
    split_seed,
)

NAMES = list(TASKS)
lengths = st.integers(30, 300)
seeds = st.integers(0, 2**63 - 1)
indices = st.integers(0, 2**62)


def plain_answer(name: TaskName, source: list[int], length: int) -> list[int]:
    """What the target of a source must be, by reading the source; asserts that the source is one of the task."""
    match name:
        case "copy" | "reverse" | "sort":
            assert len(source) == length and set(source) <= set(range(32))
            return {"copy": source, "reverse": source[::-1], "sort": sorted(source)}[name]
        case "two_back":
            assert len(source) == length and set(source) <= set(range(1, 16))
            return [0, 0] + [source[place - 2] for place in range(2, length)]
        case "local_count":
            assert len(source) == length and set(source) <= set(range(16))
            counts: list[int] = []
            for place, symbol in enumerate(source):
                counts.append(counts[-1] + 1 if place and source[place - 1] == symbol else 16)
            assert max(counts) < 16 + 48
            return counts
        case "flip_flop":
            commands, bits = source[::2], source[1::2]
            assert len(commands) == length // 2 and len(bits) == len(commands) - 1 and set(bits) <= {0, 1}
            assert commands[0] == 2 and set(commands[1:-1]) <= {2, 3} and commands[-1] == 4
            written = [bit for command, bit in zip(commands, bits, strict=False) if command == 2]
            return written[-1:]
        case "mqmtar":
            return recalled(source, length)


def recalled(source: list[int], length: int) -> list[int]:
    context, queries = source[:length], source[length:]
    pairs: dict[tuple[int, int], list[int]] = {}
    place = 0
    while place < length:
        if context[place] == 0:
            place += 1
            continue
        pair = context[place : place + 6]
        key, value = pair[:2], pair[3:5]
        assert pair[2] == 1 and pair[5] == 0 and min(key + value) >= 3 and max(key + value) < 3 + 256
        assert (key[0], key[1]) not in pairs and value not in pairs.values()
        pairs[key[0], key[1]] = value
        place += 6
    assert len(pairs) == int(0.8 * length / 6 + 1e-9)
    assert len(queries) == 12 and queries[::3] == [2] * 4
    asked = [(queries[i + 1], queries[i + 2]) for i in range(0, 12, 3)]
    return [token for key in asked for token in (2, *pairs[key])]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60)
@given(index=indices, seed=seeds, length=lengths)
def test_every_sample_is_what_the_task_says(name: TaskName, index: int, seed: int, length: int) -> None:
    task = TASKS[name]
    sample = task.sample(index, seed, length)
    assert sample.source.dtype == sample.target.dtype == np.int64
    assert sample.target.tolist() == plain_answer(name, sample.source.tolist(), length)
    assert max(sample.source.max(), sample.target.max()) < task.symbols
    again = task.sample(index, seed, length)
    assert all(np.array_equal(a, b) for a, b in zip(sample, again, strict=True))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20)
@given(index=indices, seed=seeds, length=lengths)
def test_tokens_and_labels(name: TaskName, index: int, seed: int, length: int) -> None:
    task = TASKS[name]
    sample = task.sample(index, seed, length)
    tokens, labels = (part.tolist() for part in task.encode(sample))
    source, target = sample.source.tolist(), sample.target.tolist()
    bos, sep, eos = task.symbols, task.symbols + 1, task.symbols + 2
    assert tokens == [bos, *source, sep, *target]
    assert labels == [-100] * (1 + len(source)) + [*target, eos]
    assert len(tokens) == task.row_length(length) and eos < task.vocab_size == task.symbols + 3


@settings(max_examples=50)
@given(key=st.integers(0, 2**64 - 1), count=st.integers(0, 200), extra=st.integers(0, 300))
def test_distinct_draws_are_the_first_ones_of_the_stream(key: int, count: int, extra: int) -> None:
    below = count + extra + 1
    stream = draw(key, 60 * below, below).tolist()
    assert draw_distinct(key, count, below).tolist() == list(dict.fromkeys(stream))[:count]


def test_draws_are_uniform() -> None:
    drawn = np.concatenate([draw(key, 100, 7) for key in range(700)])
    counts = np.bincount(drawn, minlength=7)
    assert len(counts) == 7 and ((counts - 10_000) ** 2 / 10_000).sum() < 22.5  # chi-square, 6 degrees: p = 0.001


def test_the_proportions_that_the_tasks_name() -> None:
    flips = [TASKS["flip_flop"].sample(i, 1, 400).source[2:-1:2] for i in range(200)]
    assert abs((np.concatenate(flips) == 2).mean() - 0.1) < 0.005
    runs = Counter[int]()
    for i in range(200):
        counts = TASKS["local_count"].sample(i, 1, 1000).target - 16
        ends = np.flatnonzero(counts == 0)[1:]
        runs.update((counts[ends - 1] + 1).tolist())
    assert set(runs) == set(range(2, 49))
    spaces = [int(np.flatnonzero(TASKS["mqmtar"].sample(i, 1, 600).source)[0]) for i in range(50)]
    assert min(spaces) == 0 and max(spaces) > 1  # the context may start with spaces


def test_the_words_of_mqmtar_are_ten_thousand_keys_and_as_many_values() -> None:
    source = TASKS["mqmtar"].sample(0, 0, 80_000).source[:80_000]  # has room for more
    marks = np.flatnonzero(source == 1)
    keys = set(zip(source[marks - 2].tolist(), source[marks - 1].tolist(), strict=True))
    values = set(zip(source[marks + 1].tolist(), source[marks + 2].tolist(), strict=True))
    assert len(marks) == len(keys) == len(values) == 10_000 and keys != values
    others = TASKS["mqmtar"].sample(1, 1, 64).source[:64]
    places = np.flatnonzero(others == 1)
    assert set(zip(others[places - 2].tolist(), others[places - 1].tolist(), strict=True)) < keys


FROZEN = {  # another digest means other samples than those that models were trained on: FORMAT must go up with it
    "copy": [411, 6042, 7],
    "reverse": [411, 6042, 3],
    "sort": [411, 6042, 0],
    "mqmtar": [3566, 80713, 2],
    "flip_flop": [52, 819, 0],
    "local_count": [306, 4869, 16],
    "two_back": [215, 3165, 0],
}


def test_samples_stay_what_they_are() -> None:
    for name, task in TASKS.items():
        source, target = task.sample(3, 5, 32)
        weighted = int((source * np.arange(len(source))).sum())
        assert [int(source.sum()), weighted, int(target[0])] == FROZEN[name], name


@pytest.mark.parametrize("name", NAMES)
def test_splits_and_seeds_share_no_sample(name: TaskName) -> None:
    task = TASKS[name]
    seen = Counter[bytes]()
    for split in SPLITS:
        for seed in (0, 1):
            seen.update(task.sample(i, split_seed(split, seed), 400).source.tobytes() for i in range(200))
    assert seen.total() == len(seen) == 3 * 2 * 200


def test_training_lengths_are_uniform_and_rows_have_one_size() -> None:
    sequences = TaskSequences(TaskConfig("copy", 32, 40), 90, seed=0, split="train")
    counts = Counter(sequences.length(i) for i in range(9000))
    assert set(counts) == set(range(32, 41)) and max(abs(n - 1000) for n in counts.values()) < 120
    for i in range(20):
        row, task = sequences.sequence(i), TASKS["copy"]
        used = task.row_length(sequences.length(i))
        assert row.tokens.shape == row.labels.shape == (90,) and row.lengths.tolist() == [90]
        assert (row.tokens[used:] == task.eos).all() and (row.labels[used:] == -100).all()
        tokens, labels = task.encode(task.sample(i, sequences.seed, sequences.length(i)))
        assert np.array_equal(row.tokens[:used], tokens) and np.array_equal(row.labels[:used], labels)


def make_module(**options: Any) -> PackedDataModule:
    known: dict[str, Any] = {"sequence_length": 130, "global_batch_size": 8, "micro_batch_size": 4, "num_workers": 0}
    return PackedDataModule(task=TaskConfig("copy"), **(known | {"val_sequences": 8} | options))


def test_batches_of_the_data_module() -> None:
    data = make_module()
    data.setup()
    assert (data.tokenizer_path, data.vocab_size) == ("task:copy", 35)
    assert data.tokenizer_fingerprint == TASKS["copy"].fingerprint != TASKS["reverse"].fingerprint
    batch = next(iter(data.train_dataloader()))
    assert batch["tokens"].shape == batch["labels"].shape == (1, 4 * 130)
    assert batch["cu_seqlens"].tolist() == [0, 130, 260, 390, 520] and batch["max_seqlen"] == 130
    other = make_module(seed=1, global_batch_size=4)
    other.setup()
    assert not torch.equal(next(iter(other.train_dataloader()))["tokens"], batch["tokens"])
    loaders: list[Any] = [data.val_dataloader(), other.val_dataloader()]
    held_out = [torch.cat([one["tokens"] for one in loader]) for loader in loaders]
    assert torch.equal(*held_out) and held_out[0].shape == (2, 520)  # the same for every seed


def test_the_state_restores_and_refuses_another_order() -> None:
    data = make_module()
    data.consumed_samples = 16
    state = json.loads(json.dumps(data.state_dict()))
    again = make_module(micro_batch_size=2)
    again.load_state_dict(state)
    assert next(iter(again.train_dataloader()))["sample_ids"].tolist() == [16, 17]
    with pytest.raises(ValueError, match="trained with data.task .*'max_length': 64.* has .*'max_length': 60"):
        PackedDataModule(task=TaskConfig("copy", 32, 60), sequence_length=130).load_state_dict(state)
    with pytest.raises(ValueError, match="trained with data.seed 0, the config has 3"):
        make_module(seed=3).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("sorting",), "data.task.name is 'sorting': expected one of copy, reverse, sort"),
        (("copy", 65, 64), "are 65 and 64: expected 1 <= min_length <= max_length <= 16777216 for task copy"),
        (("mqmtar", 29, 64), "are 29 and 64: expected 30 <= min_length"),
        (("flip_flop", 0, 64), "expected 4 <= min_length"),
    ],
)
def test_bad_tasks_are_named(options: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskConfig(*options)


def test_bad_combinations_are_named() -> None:
    with pytest.raises(ValueError, match="sequence_length is 129, but samples of copy .* have up to 130 tokens"):
        make_module(sequence_length=129)
    with pytest.raises(ValueError, match="data.task.name is copy, but data.sources has corpora too"):
        make_module(sources=[SourceConfig("a")])
    with pytest.raises(ValueError, match="data.task.name is not set"):
        _ = TaskConfig().task


def test_a_fingerprint_says_what_the_ids_mean() -> None:
    assert len({task.fingerprint for task in TASKS.values()}) == len(TASKS)
    wider = Task("copy", 64, 1, lambda key, length: Sample(np.zeros(1, np.int64), np.zeros(1, np.int64)))
    assert wider.fingerprint != TASKS["copy"].fingerprint
