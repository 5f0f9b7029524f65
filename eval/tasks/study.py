"""What eval.tasks has measured, and the rows that its tables show."""

from dataclasses import dataclass
from typing import Any

from eval.common.provenance import Provenance
from eval.tasks.results import TaskResult
from eval.tasks.scores import Difference, Score


@dataclass(frozen=True)
class RunResult:
    """One checkpoint on all tasks, in the same order for every run. model: its configuration."""

    label: str
    checkpoint: str
    step: int
    model: dict[str, Any]
    training_length: int
    trained_with: str
    window: int | None
    precision: str
    tasks: list[TaskResult]


@dataclass(frozen=True)
class Study(Provenance):
    """All that the tables are made of. settings: of the evaluation. seconds: reused results not counted."""

    runs: list[RunResult]
    settings: dict[str, Any]
    seconds: float


@dataclass(frozen=True)
class Row:
    """One metric of one task. scores: one a run. differences: one a run, None for the baseline and where none is.
    left_out: of each run, how many samples do not fit."""

    task: str
    group: str
    length: int | None
    chance: float | None
    scores: list[Score]
    differences: list[Difference | None]
    left_out: list[int]


@dataclass(frozen=True)
class Rows:
    """groups: the tasks of a group together. single: every task by itself; empty where no group has several. means: of
    the groups, at each length, where they are several."""

    groups: list[Row]
    single: list[Row]
    means: list[Row]
