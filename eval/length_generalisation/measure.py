"""One run at one length: what is measured, and how."""

import math
import time
from dataclasses import dataclass, field
from typing import Literal

from common.checks import LARGEST_SEED, LONGEST_CONTEXT, MOST_SAMPLES
from data.length_generalisation import Task, TaskConfig, split_seed
from eval.common import provenance
from eval.common.options import check_least, check_most
from eval.common.scoring import Context, LanguageModel, Runtime, score
from eval.reporting.statistics import Interval, share

TOKENS_AT_ONCE = 2**20  # of samples that wait on the host to be scored


@dataclass(frozen=True)
class LengthConfig:
    """What is measured.

    Args:
        lengths: Multiples of the longest training length; such as 1.5 where that gives a whole length.
        samples: Samples of each length, the same for all runs of a task.
        seed: Of the samples. Training never sees them, whatever its seed.
        device: "auto" takes CUDA where there is one, else the CPU.
        precision: "auto" is bfloat16 autocast on CUDA for runs trained in bf16, else float32.
        row_tokens: Most tokens packed into one forward pass; a longer sample is a row of its own.
    """

    lengths: list[float] = field(default_factory=lambda: [1, 2, 4, 8])
    samples: int = 1000
    seed: int = 0
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    row_tokens: int = 8192

    def __post_init__(self) -> None:
        finite = all(map(math.isfinite, self.lengths))
        if not self.lengths or not finite or self.lengths != sorted(set(self.lengths)) or self.lengths[0] <= 0:
            raise ValueError(f"lengths is {self.lengths}: expected different multiples in rising order such as 1 2 4 8")
        check_least(self, {"samples": 1, "seed": 0, "row_tokens": 1})
        check_most(self, {"samples": MOST_SAMPLES, "seed": LARGEST_SEED})


@dataclass(frozen=True)
class LengthResult:
    """One run at one length.

    Args:
        length: Of the samples, as data/length_generalisation.py counts it.
        multiple: Of the longest training length.
        exact: Samples whose target and <eos> came out whole.
        hits, tokens: Tokens of targets and <eos> that are the model's first choice behind the true ones, and all.
    """

    length: int
    multiple: float
    samples: int
    exact: int
    hits: int
    tokens: int
    hardware: str
    date: str
    seconds: float

    @property
    def exact_match(self) -> Interval:
        return share(self.exact / self.samples, self.samples)

    @property
    def token_accuracy(self) -> Interval:
        # the tokens of a sample are not independent: samples are the trials
        return share(self.hits / self.tokens, self.samples)


def length_of(task: TaskConfig, multiple: float) -> int:
    """`multiple` times the longest training length. Raises ValueError where that is no length of the task."""
    length = multiple * task.max_length
    if length != int(length) or not task.task.shortest <= length <= LONGEST_CONTEXT:
        raise ValueError(
            f"lengths has {multiple:g}, which is {length:g} symbols for {task.name}, trained up to {task.max_length}: "
            f"expected multiples that give whole lengths from {task.task.shortest} to {LONGEST_CONTEXT}"
        )
    return int(length)


def measure(
    model: LanguageModel,
    task: Task,
    length: int,
    multiple: float,
    config: LengthConfig,
    runtime: Runtime,
    label: str,
) -> LengthResult:
    """Scores a model on `config.samples` samples of one length."""
    started = time.monotonic()
    seed = split_seed("evaluation", config.seed)
    at_once = max(1, TOKENS_AT_ONCE // task.row_length(length))
    exact = hits = tokens = 0
    for first in range(0, config.samples, at_once):
        indices = range(first, min(first + at_once, config.samples))
        contexts = [Context(*task.encode(task.sample(index, seed, length))) for index in indices]
        for one in score(model, contexts, runtime, f"{label}: {task.name} at {length}"):
            exact += bool(one.hit.all())
            hits += int(one.hit.sum())
            tokens += len(one.hit)
    return LengthResult(
        length=length,
        multiple=multiple,
        samples=config.samples,
        exact=exact,
        hits=hits,
        tokens=tokens,
        hardware=provenance.hardware(runtime.device),
        date=provenance.now(),
        seconds=round(time.monotonic() - started, 2),
    )
