"""The length-generalisation tasks of the ASEntmax paper (arXiv 2506.16640): trained short, evaluated long.

A sample is `<bos> source <sep> target <eos>`; what is to be predicted is the target and <eos>. Formats are those of the
paper's published generator (github.com/deep-spin/asentmax), with these differences: samples have their length exactly
where it meets it nearly (MQMTAR, LocalCount); Flip-Flop has a <sep> like the others; LocalCount and 2Back, which are
published as labels on the source's own tokens, have their labels as the target.

A sample is a pure function of task, seed, index and length: its random numbers are splitmix64's at a key hashed from
them, own integer arithmetic for the reason that data.packing gives.

Ids: the task's symbols from 0 on, then <bos>, <sep>, <eos>. `length` counts the symbols of the source, but for MQMTAR
(without the queries behind them) and Flip-Flop (with the answer, and rounded down to whole instructions).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.checks import LONGEST_CONTEXT
from data.packing import IGNORED_LABEL, PackedSequence
from data.permutation import derive_key, mix

TaskName = Literal["copy", "reverse", "sort", "mqmtar", "flip_flop", "local_count", "two_back"]
Split = Literal["train", "validation", "evaluation"]
Ids = NDArray[np.int64]

SPLITS: tuple[Split, ...] = ("train", "validation", "evaluation")
FORMAT = 1  # of the samples; goes up with every change of what a seed gives
ENDLESS = 2**62
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's increment


class Sample(NamedTuple):
    """source, target: int64 ids, without <bos>, <sep> and <eos>."""

    source: Ids
    target: Ids


def draw(key: int, count: int, below: int) -> Ids:
    """`count` integers, uniform in range(below) but for a bias under below / 2**32; below < 2**32. key: 64 bits."""
    counter = np.arange(1, count + 1, dtype=np.uint64) * GOLDEN_GAMMA + np.uint64(key)
    return ((mix(counter) >> np.uint64(32)) * np.uint64(below) >> np.uint64(32)).astype(np.int64)


def draw_distinct(key: int, count: int, below: int) -> Ids:
    """`count` <= below different integers of range(below): the first ones that `draw` gives."""
    tries = 2 * count
    while True:
        _, first = np.unique(drawn := draw(key, tries, below), return_index=True)
        if len(first) >= count:
            return drawn[np.sort(first)[:count]]
        tries *= 2


def _keys(key: int, count: int) -> list[int]:
    """Unrelated keys for the independent choices of one sample."""
    return [derive_key(key - 2**63, choice) for choice in range(count)]


SYMBOLS = 32  # of Copy, Reverse and Sort


def _copy(key: int, length: int) -> Sample:
    """Uniform symbols; the target is the source."""
    source = draw(key, length, SYMBOLS)
    return Sample(source, source)


def _reverse(key: int, length: int) -> Sample:
    """Uniform symbols; the target is the source backwards."""
    source = draw(key, length, SYMBOLS)
    return Sample(source, source[::-1].copy())


def _sort(key: int, length: int) -> Sample:
    """Uniform symbols; the target has them in ascending order."""
    source = draw(key, length, SYMBOLS)
    return Sample(source, np.sort(source))


SPACE, KEY_VALUE, QUERY, FIRST_LETTER = 0, 1, 2, 3
LETTERS, WORDS, QUERIES = 256, 10_000, 4
PAIR = 6  # k k 1 v v and the space that ends it


@functools.cache
def _words(which: int) -> Ids:
    """(WORDS, 2): the 2-grams that serve as keys (which = 0) or values (1), the same in every sample and split."""
    grams = draw_distinct(derive_key(which), WORDS, LETTERS**2)
    return FIRST_LETTER + np.stack([grams // LETTERS, grams % LETTERS], 1)


def _mqmtar(key: int, length: int) -> Sample:
    """Multi-query multi-token associative recall.

    `length` tokens of context: pairs `k k 1 v v`, each with a space (0) behind it, fill 80 % of it (at most 10,000
    pairs: keys differ, and so do values), the other spaces lie at random before, between and behind them. Then four
    queries `2 k k`, each for any of the pairs. Target: `2 v v` for each.
    """
    chosen_keys, chosen_values, gaps, asked = _keys(key, 4)
    pairs = min(WORDS, length * 4 // (5 * PAIR))
    k = _words(0)[draw_distinct(chosen_keys, pairs, WORDS)]
    v = _words(1)[draw_distinct(chosen_values, pairs, WORDS)]
    spaces = np.bincount(draw(gaps, length - PAIR * pairs, pairs + 1), minlength=pairs + 1)
    starts = PAIR * np.arange(pairs) + np.cumsum(spaces)[:pairs]
    context = np.full(length, SPACE, np.int64)
    context[starts[:, None] + np.arange(PAIR - 1)] = np.column_stack([k, np.full(pairs, KEY_VALUE), v])
    query = draw(asked, QUERIES, pairs)
    mark = np.full(QUERIES, QUERY)
    source = np.concatenate([context, np.column_stack([mark, k[query]]).ravel()])
    return Sample(source, np.column_stack([mark, v[query]]).ravel())


WRITE, IGNORE, READ = 2, 3, 4
IGNORES_PER_WRITE = 9


def _flip_flop(key: int, length: int) -> Sample:
    """Pairs of a command and a bit: write (2) first, then write with probability 0.1, else ignore (3); read (4) last.

    length // 2 pairs, whose last bit is the target: the bit that was last written.
    """
    bit_key, command_key = _keys(key, 2)
    pairs = length // 2
    bits = draw(bit_key, pairs, 2)
    commands = np.where(draw(command_key, pairs, 1 + IGNORES_PER_WRITE) == 0, WRITE, IGNORE)
    commands[0], commands[-1] = WRITE, READ
    last_write = np.flatnonzero(commands == WRITE)[-1]
    return Sample(np.column_stack([commands, bits]).ravel()[:-1], bits[last_write : last_write + 1])


COUNTED_SYMBOLS, LONGEST_RUN = 16, 48


def _local_count(key: int, length: int) -> Sample:
    """Runs of 2 to 48 equal symbols (the last one cut at `length`), neighbours differ; target: place in the run from 0.

    Counts have ids of their own, behind the symbols.
    """
    run_key, symbol_key = _keys(key, 2)
    count = length // 2 + 1  # runs that suffice
    starts = np.concatenate([[0], np.cumsum(2 + draw(run_key, count, LONGEST_RUN - 1))])
    steps = draw(symbol_key, count, COUNTED_SYMBOLS - 1)
    symbols = np.cumsum(1 + steps) % COUNTED_SYMBOLS
    position = np.arange(length)
    run = np.searchsorted(starts, position, side="right") - 1
    return Sample(symbols[run], COUNTED_SYMBOLS + position - starts[run])


BACK, BACK_SYMBOLS = 2, 16


def _two_back(key: int, length: int) -> Sample:
    """Uniform symbols 1 to 15; the target has at each place the symbol two places before, and 0 at the first two."""
    source = 1 + draw(key, length, BACK_SYMBOLS - 1)
    return Sample(source, np.concatenate([np.zeros(BACK, np.int64), source[:-BACK]]))


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        name: as in configs.
        symbols: ids of source and target are below this.
        shortest: least length.
        generate: (64-bit key, length) -> sample.
    """

    name: TaskName
    symbols: int
    shortest: int
    generate: Callable[[int, int], Sample]

    @property
    def bos(self) -> int:
        return self.symbols

    @property
    def sep(self) -> int:
        return self.symbols + 1

    @property
    def eos(self) -> int:
        return self.symbols + 2

    @property
    def vocab_size(self) -> int:
        return self.symbols + 3

    @property
    def fingerprint(self) -> str:
        """sha256 of what the ids mean: models of the same fingerprint have learnt the same task."""
        definition = {"task": self.name, "symbols": self.symbols, "format": FORMAT}
        return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()

    def sample(self, index: int, seed: int, length: int) -> Sample:
        """Sample `index` of those of a seed (below 2**63, see `split_seed`) and a length."""
        return self.generate(derive_key(seed, index, length), length)

    def encode(self, sample: Sample) -> tuple[Ids, Ids]:
        """tokens and labels, each (2 + source + target,) int64: <bos> source <sep> target, and what follows each of
        them; -100 before <sep>."""
        whole = np.concatenate([[self.bos], sample.source, [self.sep], sample.target, [self.eos]])
        labels = whole[1:].copy()
        labels[: 1 + len(sample.source)] = IGNORED_LABEL
        return whole[:-1], labels

    def row_length(self, length: int) -> int:
        """Tokens of a sample of that length: of every one of them, and not fewer for a longer one."""
        return 2 + sum(map(len, self.generate(0, length)))


TASKS: dict[TaskName, Task] = {
    task.name: task
    for task in (
        Task("copy", SYMBOLS, 1, _copy),
        Task("reverse", SYMBOLS, 1, _reverse),
        Task("sort", SYMBOLS, 1, _sort),
        Task("mqmtar", FIRST_LETTER + LETTERS, 30, _mqmtar),  # room for as many pairs as queries
        Task("flip_flop", READ + 1, 4, _flip_flop),
        Task("local_count", COUNTED_SYMBOLS + LONGEST_RUN, 1, _local_count),
        Task("two_back", BACK_SYMBOLS, BACK, _two_back),
    )
}


def split_seed(split: Split, seed: int) -> int:
    """The seed of a split's samples: those of different splits have nothing to do with one another, whatever seeds.

    Where there are few samples, equal ones meet by chance: LocalCount at its training lengths has three or four runs.
    """
    return derive_key(SPLITS.index(split), seed) >> 1


@dataclass(frozen=True)
class TaskConfig:
    """A length-generalisation task to train on instead of corpora (configs/length_generalisation).

    Args:
        name: the task, see data/length_generalisation.py; null for none
        min_length: shortest training samples
        max_length: longest training samples; lengths are uniform between the two
    """

    name: TaskName | None = None
    min_length: int = 32
    max_length: int = 64

    def __post_init__(self) -> None:
        if self.name is None:
            return
        if self.name not in TASKS:
            raise ValueError(f"data.task.name is {self.name!r}: expected one of {', '.join(TASKS)}")
        if not TASKS[self.name].shortest <= self.min_length <= self.max_length <= LONGEST_CONTEXT:
            raise ValueError(
                f"data.task.min_length and max_length are {self.min_length} and {self.max_length}: expected "
                f"{TASKS[self.name].shortest} <= min_length <= max_length <= {LONGEST_CONTEXT} for task {self.name}"
            )

    @property
    def task(self) -> Task:
        """Raises ValueError where no task is set."""
        if self.name is None:
            raise ValueError("data.task.name is not set: expected one of " + ", ".join(TASKS))
        return TASKS[self.name]


NO_TASK = TaskConfig()


class TaskSequences:
    """Each sequence is one sample, filled up to `sequence_length`. See data.packing.Sequences.

    Micro-batches must have the same number of tokens (training.module.LanguageModule), and samples differ in length.
    What fills them up is <eos>, without labels, behind the sample and in its document: attention is causal, so the
    sample does not see it, and since every document then is a whole row, batches have one shape for all steps.
    """

    sequences_per_pass = ENDLESS

    def __init__(self, config: TaskConfig, sequence_length: int, seed: int, split: Split) -> None:
        self.config, self.task = config, config.task
        self.sequence_length = sequence_length
        self.seed = split_seed(split, seed)

    def length(self, index: int) -> int:
        """The length of sample `index`."""
        choices = self.config.max_length - self.config.min_length + 1
        # derive_key of two parts: unrelated to the samples' keys, which have three
        return self.config.min_length + int(draw(derive_key(self.seed, index), 1, choices)[0])

    def document_lengths(self, indices: Sequence[int]) -> list[NDArray[np.int64]]:
        """(1,) for each: a sample fills a sequence."""
        return [np.array([self.sequence_length], np.int64)] * len(indices)

    def sequence(self, index: int) -> PackedSequence:
        sample_tokens, sample_labels = self.task.encode(self.task.sample(index, self.seed, self.length(index)))
        tokens = np.full(self.sequence_length, self.task.eos, np.int64)
        labels = np.full(self.sequence_length, IGNORED_LABEL, np.int64)
        tokens[: len(sample_tokens)], labels[: len(sample_labels)] = sample_tokens, sample_labels
        return PackedSequence(tokens, labels, np.array([self.sequence_length], np.int64))


class TaskSource:
    """The samples of a task as the content of a data module; see data.datamodule.TokenSource.

    Raises ValueError for a sequence_length below that of the longest sample.
    """

    def __init__(self, config: TaskConfig, *, sequence_length: int, seed: int) -> None:
        self.config, self.task = config, config.task
        self.sequence_length, self.seed = sequence_length, seed
        needed = self.task.row_length(config.max_length)
        if sequence_length < needed:
            raise ValueError(
                f"data.sequence_length is {sequence_length}, but samples of {config.name} with data.task.max_length "
                f"{config.max_length} have up to {needed} tokens: set it to at least that"
            )
        self.tokenizer_path = f"task:{config.name}"  # ids are the task's own: there is no tokenizer
        self.tokenizer_fingerprint = self.task.fingerprint
        self.vocab_size = self.task.vocab_size

    def prepare(self) -> None:
        """Nothing lies on disk."""

    def open(self) -> None:
        """Nothing lies on disk."""

    def train_sequences(self) -> TaskSequences:
        return TaskSequences(self.config, self.sequence_length, self.seed, "train")

    def heldout_sequences(self) -> TaskSequences:
        """Samples of the training lengths that training never sees; they do not depend on the seed."""
        return TaskSequences(self.config, self.sequence_length, 0, "validation")

    def order(self) -> dict[str, Any]:
        """What decides, besides seed and sequence_length, what the sequences hold."""
        return {"task": {**asdict(self.config), "fingerprint": self.task.fingerprint}}
