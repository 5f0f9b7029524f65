"""RULER in the report of eval.sparse_frontier."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eval.reporting.document import Block, Heading, Paragraph, Picture, Table
from eval.reporting.formatting import count, percent_text
from eval.reporting.statistics import LEAST_UNITS, Interval, paired_shares, share
from eval.sparse_frontier.config import RulerCell, Study
from eval.sparse_frontier.names import AS_THEY_ARE, density_text, method_name
from eval.sparse_frontier.plots import PANELS_IN_A_ROW, Panel, Point, in_rows, over_density
from eval.sparse_frontier.tasks import CLOSE

AXIS = "RULER's score (%)"
ACTS = {
    "prefill": "Policies act on the whole prompt; the answer is decoded densely.",
    "decode": "Policies act on the answer's tokens and on the prompt's last one, behind a densely prefilled prompt.",
}
METHOD = (
    "Frozen samples of these lengths, answered greedily; score: share of the answers that are found in the text, for "
    "qa_squad whether any is. {acts} Density, here and in RULER's plots: measured on these samples, so that it differs "
    "from the one that policies were set to on held-out text. Intervals: Clopper-Pearson over samples; against dense "
    "softmax: Bonett and Price's for paired samples (both too wide, not too narrow, where a sample can count in part "
    f"or tasks differ). None below {LEAST_UNITS} samples."
)


@dataclass(frozen=True)
class RulerSummary:
    """One way of attending on all tasks of one length, each with as many samples.

    density, accuracy: mean over tasks. difference: of accuracy to the dense softmax model's, paired over samples.
    tasks, densities: accuracy and density of each task. samples: of all tasks together.
    """

    method: str
    phase: str
    multiple: int
    context: int
    wanted: float | None
    samples: int
    density: float
    accuracy: Interval
    difference: Interval
    tasks: dict[str, Interval]
    densities: dict[str, float]


def summarise_ruler(study: Study) -> list[RulerSummary]:
    """One for each method, phase, length and density, in the order in which they were measured; none without RULER."""
    found: dict[tuple[str, str, int, float | None], list[RulerCell]] = {}
    for cell in study.ruler:
        found.setdefault((cell.method, cell.phase, cell.multiple, cell.wanted), []).append(cell)
    return [_summary(cells, found["dense", phase, multiple, None]) for (_, phase, multiple, _), cells in found.items()]


def _summary(cells: Sequence[RulerCell], dense: Sequence[RulerCell]) -> RulerSummary:
    first = cells[0]
    scores, theirs = (np.array([one.scores for one in of]) for of in (cells, dense))  # [tasks, samples]
    return RulerSummary(
        first.method, first.phase, first.multiple, first.context, first.wanted, scores.size,
        density=float(np.mean([one.density for one in cells])),
        accuracy=_mean(scores),
        difference=paired_shares(scores.ravel(), theirs.ravel()),
        tasks={one.task: _mean(row) for one, row in zip(cells, scores, strict=True)},
        densities={one.task: one.density for one in cells},
    )  # fmt: skip


def _mean(scores: NDArray[np.float64]) -> Interval:
    """Samples of all tasks together, which is too wide where tasks differ: the tasks are no sample of tasks."""
    return share(min(1.0, float(scores.mean())), scores.size)  # rounding can leave a mean above 1


def ruler_panel(summaries: Sequence[RulerSummary], multiple: int) -> Panel:
    """The mean over tasks at one length; without points where it was not measured."""
    here = [one for one in summaries if one.multiple == multiple]
    title = f"{here[0].context:,} tokens: RULER, mean of {_count(here[0])}" if here else ""
    return Panel(title, AXIS, [_point(one, one.density, one.accuracy) for one in here])


def _count(one: RulerSummary) -> str:
    return count(len(one.tasks), "task")


def _point(one: RulerSummary, density: float, accuracy: Interval) -> Point:
    return Point(method_name(one.method), one.method, density, accuracy.map(lambda part: 100 * part))


def ruler_blocks(summaries: Sequence[RulerSummary], phase: str, output: Path) -> list[Block]:
    """A table for each length and the plot of every task, of one phase; nothing without RULER."""
    if not summaries:
        return []
    rows: list[list[Panel]] = []
    tables: list[Block] = []
    columns = min(PANELS_IN_A_ROW, max(len(one.tasks) for one in summaries))
    for multiple in dict.fromkeys(one.multiple for one in summaries):
        here = [one for one in summaries if one.multiple == multiple]
        title = f"{here[0].context:,} tokens ({multiple}x), {count(here[0].samples, 'sample')}"
        tables.append(_table(here, title))
        rows += _task_panels(here, columns)
    path = over_density(rows, output / f"plots/{phase}_ruler_over_density.png")
    picture = Picture(path, f"Every RULER task over density, {phase}.")
    return [Heading("RULER", 3), picture, Paragraph(METHOD.format(acts=ACTS[phase])), *tables]


def _table(summaries: Sequence[RulerSummary], title: str) -> Table:
    tasks = list(summaries[0].tasks)
    header = ["", "set to", "density", "mean of the tasks", "minus dense softmax's", *tasks]
    rows = [
        [
            method_name(one.method), density_text(one.wanted), density_text(one.density), percent_text(one.accuracy),
            "" if one.method == "dense" else percent_text(one.difference),
            *(percent_text(one.tasks[task]) for task in tasks),
        ]
        for one in summaries
    ]  # fmt: skip
    return Table(header, rows, caption=title)


def _task_panels(summaries: Sequence[RulerSummary], columns: int) -> list[list[Panel]]:
    """Rows of so many panels, the last one filled up with empty ones."""
    panels = []
    for task in summaries[0].tasks:
        points = [_point(one, one.densities[task], one.tasks[task]) for one in summaries]
        panels.append(Panel(f"{summaries[0].context:,} tokens: {task}", AXIS, points))
    return in_rows(panels, columns)


def ruler_lines(summaries: Sequence[RulerSummary]) -> list[str]:
    """A line for each phase and length: both models as they are, and the best policy of about entmax's density or
    less, all densities on RULER's samples."""
    lines = []
    for phase, multiple in dict.fromkeys((one.phase, one.multiple) for one in summaries):
        here = [one for one in summaries if (one.phase, one.multiple) == (phase, multiple)]
        shown = [one for one in here if one.method in AS_THEY_ARE]
        entmax = next(one for one in shown if one.method == "entmax")
        rivals = [one for one in here if one not in shown and one.density <= (1 + CLOSE) * entmax.density]
        shown += sorted(rivals, key=lambda one: -one.accuracy.value)[:1]
        cells = "; ".join(
            f"{method_name(one.method)} {percent_text(one.accuracy)} at {density_text(one.density)}" for one in shown
        )
        lines.append(f"{phase}, {here[0].context:,} tokens, RULER ({_count(here[0])}): {cells}")
    return lines
