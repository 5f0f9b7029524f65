"""Tables and plot of the length-generalisation tasks, beside the paper's figures."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.files import write_file
from data.length_generalisation import TaskConfig
from eval.common.provenance import Provenance
from eval.length_generalisation.figures import Curve, exact_match_over_length
from eval.length_generalisation.measure import LengthResult
from eval.reporting.document import Block, Heading, Paragraph, Picture, Table, Verdict
from eval.reporting.formatting import count, fixed, percent_text
from eval.reporting.statistics import LEAST_UNITS, Interval
from eval.reporting.tables import interval_columns
from eval.reporting.verdict import sentence
from eval.reporting.writing import made_by, write_documents

TITLE = "LongSplash length generalisation"

# Exact match in %, by multiple of the training length: Table 1 of arXiv 2506.16640 (NAPE; the rows of softmax and
# ASEntmax). The layers are those of configs/length_generalisation.
PAPER_SOURCE, PAPER_LENGTHS = "arXiv 2506.16640, Table 1", "32 to 64"
PAPER: dict[str, dict[str, dict[float, float]]] = {
    "sort": {
        "softmax": {1: 100, 2: 0, 4: 0, 8: 0},
        "asentmax": {1: 100, 2: 100, 4: 79.7, 8: 0},
    },
    "reverse": {
        "softmax": {1: 100, 1.5: 36, 2: 0, 4: 0, 8: 0},
        "asentmax": {1: 100, 1.5: 100, 2: 99.8, 4: 96.4, 8: 56.7},
    },
    "copy": {
        "softmax": {1: 100, 2: 100, 4: 99.9, 8: 99.9, 16: 99.4, 32: 96.1, 64: 85.5},
        "asentmax": {1: 100, 2: 100, 4: 99.9, 8: 99.7, 16: 99.4, 32: 96.3, 64: 86.6},
    },
    "mqmtar": {
        "softmax": {1: 100, 2: 100, 4: 100, 16: 99.5, 64: 97.8},
        "asentmax": {1: 100, 2: 100, 4: 100, 16: 99.7, 64: 99.6},
    },
}


@dataclass(frozen=True)
class RunResult:
    """One checkpoint at all lengths. planned_steps, seed: of the run's config.yaml. model: its configuration."""

    label: str
    checkpoint: str
    step: int
    planned_steps: int | None
    seed: int | None
    task: TaskConfig
    model: dict[str, Any]
    precision: str
    trained_with: str
    lengths: list[LengthResult]

    @property
    def attention(self) -> str:
        return str(self.model["attention"]["kind"])

    @property
    def architecture(self) -> str:
        """The model's configuration as text, without what does not change what it computes."""
        attention = {key: value for key, value in self.model["attention"].items() if key != "backend"}
        return json.dumps({**self.model, "attention": attention}, sort_keys=True)


@dataclass(frozen=True)
class Study(Provenance):
    """All runs of one evaluation, and where the numbers come from."""

    runs: list[RunResult]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Group:
    """Runs of one task and architecture: they differ in their seeds (and, as the table of runs says, in steps)."""

    label: str
    task: TaskConfig
    attention: str
    runs: list[RunResult]

    def exact_match(self) -> list[tuple[LengthResult, Interval]]:
        """By length: the mean over runs with the lowest and highest run; of one run, its 95 % interval."""
        found = []
        for same in zip(*(run.lengths for run in self.runs), strict=True):
            values = [one.exact_match.value for one in same]
            spread = Interval(sum(values) / len(values), min(values), max(values))
            found.append((same[0], same[0].exact_match if len(same) == 1 else spread))
        return found


def group_runs(runs: Sequence[RunResult]) -> list[Group]:
    """Groups in the order in which their first runs were given."""
    members: dict[tuple[TaskConfig, str], list[RunResult]] = {}
    for run in runs:
        members.setdefault((run.task, run.architecture), []).append(run)
    plain = [(task, f"{of[0].attention}, {of[0].model['n_layers']} layers") for (task, _), of in members.items()]
    groups = []
    for (task, label), of in zip(plain, members.values(), strict=True):
        if plain.count((task, label)) > 1:  # other differences of architecture
            label += f" ({', '.join(run.label for run in of)})"
        label += f", {len(of)} runs" if len(of) > 1 else ""
        groups.append(Group(label, task, of[0].attention, of))
    return groups


def tasks_of(groups: Sequence[Group]) -> list[TaskConfig]:
    return list(dict.fromkeys(group.task for group in groups))


def title_of(task: TaskConfig) -> str:
    return f"{task.name}, trained at {task.min_length} to {task.max_length}"


def write_report(study: Study, output: Path) -> tuple[Path, Picture]:
    """Writes length_generalisation.md, .json, .csv and .png and report.html into `output`; returns the path of the last
    and the plot."""
    output.mkdir(parents=True, exist_ok=True)
    groups, tables = group_runs(study.runs), output / "length_generalisation.md"
    panels = {title_of(task): _curves(task, groups) for task in tasks_of(groups)}
    path = exact_match_over_length(panels, tables.with_suffix(".png"))
    alt = f"Exact match over length. {' '.join(f'{line}.' for line in group_lines(groups))}"
    picture = Picture(path, "Exact match over length; dashed: the paper's figures.", alt)
    blocks = _blocks(study, groups, picture)
    page = write_documents(tables, TITLE, [run.label for run in study.runs], blocks, _as_json(study, groups))
    rows, table = result_rows(study), io.StringIO(newline="")
    writer = csv.DictWriter(table, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_file(tables.with_suffix(".csv"), table.getvalue().encode())
    return page, picture


def _curves(task: TaskConfig, groups: Sequence[Group]) -> list[Curve]:
    curves = []
    for group in (group for group in groups if group.task == task):
        points = [(one.multiple, rate) for one, rate in group.exact_match()]
        curves.append(Curve(group.label, group.attention, points, reference=False))
    for kind, values in PAPER.get(str(task.name), {}).items():
        points = [(multiple, Interval(value / 100, None, None)) for multiple, value in values.items()]
        curves.append(Curve(f"{kind}, paper", kind, points, reference=True))
    return curves


def _blocks(study: Study, groups: Sequence[Group], picture: Picture) -> list[Block]:
    blocks: list[Block] = [
        Heading(TITLE, 1),
        Verdict(verdict(groups), group_lines(groups)),
        Heading("Exact match over length"),
        picture,
        Paragraph(
            f"Whole-sequence exact match under greedy decoding, {count(study.settings['samples'], 'sample')} a length, "
            "by multiple of the longest training length. One run: 95 % interval (Clopper-Pearson), none below "
            f"{LEAST_UNITS} samples. Several runs: their mean, with the lowest and the highest of them. On top of the "
            "page: the longest length at which one of them is right in half of the samples. Paper: "
            f"{PAPER_SOURCE}; trained at {PAPER_LENGTHS} for the whole schedule that configs/length_generalisation has."
        ),
    ]
    for task in tasks_of(groups):
        blocks += [Heading(title_of(task), 3), _task_table(task, [group for group in groups if group.task == task])]
    blocks += [Heading("Runs"), _run_table(study.runs)]
    facts = [f"code {study.code_version}", study.hardware, study.date, f"evaluation seed {study.settings['seed']}"]
    return [*blocks, *made_by(study.command, facts)]


def verdict(groups: Sequence[Group]) -> str:
    """For each task: every group at the longest length at which one of them is right in half of the samples."""
    return sentence([_task_verdict(task, [one for one in groups if one.task == task]) for task in tasks_of(groups)])


def _task_verdict(task: TaskConfig, groups: Sequence[Group]) -> str:
    rates = {(group.label, float(one.multiple)): rate.value for group in groups for one, rate in group.exact_match()}
    lengths = [multiple for (_, multiple), rate in rates.items() if rate >= 0.5]
    if not lengths:
        return f"{task.name}: no model is right in half of the samples at any length"
    longest = max(lengths)
    at = [group.label for group in groups if (group.label, longest) in rates]
    said = [f"{label} {fixed(100 * rates[label, longest], 1)} %" for label in at]
    return f"{task.name} at {longest:g}x the training length: {', '.join(said)}"


def _task_table(task: TaskConfig, groups: Sequence[Group]) -> Table:
    paper = PAPER.get(str(task.name), {})
    measured = {one.multiple for group in groups for one, _ in group.exact_match()}
    columns = sorted(measured.union(*paper.values()))
    rows = []
    for group in groups:
        cells = {one.multiple: percent_text(rate, 1) for one, rate in group.exact_match()}
        rows.append([group.label, *(cells.get(column, "") for column in columns)])
    for kind, values in paper.items():
        cells = {multiple: f"{value:g} %" for multiple, value in values.items()}
        rows.append([f"{kind}, paper", *(cells.get(column, "") for column in columns)])
    return Table(["", *(f"{column:g}x ({column * task.max_length:g})" for column in columns)], rows)


def _run_table(runs: Sequence[RunResult]) -> Table:
    header = ["run", "task", "attention", "seed", "step", "length", "exact match", "target tokens right"]
    rows = []
    for run in runs:
        step = f"{run.step:,}" + (f" of {run.planned_steps:,}" if run.planned_steps else "")
        facts = [run.label, str(run.task.name), run.attention, str(run.seed), step]
        for one in run.lengths:
            rows.append(
                [*facts, f"{one.length:,}", percent_text(one.exact_match, 1), percent_text(one.token_accuracy, 1)]
            )
    return Table(header, rows)


def _as_json(study: Study, groups: Sequence[Group]) -> dict[str, Any]:
    summary = [
        {
            "task": asdict(group.task), "attention": group.attention, "label": group.label,
            "runs": [run.label for run in group.runs],
            "exact_match": [{"multiple": one.multiple, **asdict(rate)} for one, rate in group.exact_match()],
            "paper_percent": {
                f"{multiple:g}": value
                for multiple, value in PAPER.get(str(group.task.name), {}).get(group.attention, {}).items()
            },
        }
        for group in groups
    ]  # fmt: skip
    return {**asdict(study), "groups": summary, "paper_source": PAPER_SOURCE}


def result_rows(study: Study) -> list[dict[str, Any]]:
    """One row for each run and length; shares in [0, 1] with the ends of their 95 % intervals."""
    rows = []
    for run in study.runs:
        facts: dict[str, Any] = {"run": run.label, "task": run.task.name, "attention": run.attention}
        facts |= {"layers": run.model["n_layers"], "seed": run.seed, "step": run.step}
        for one in run.lengths:
            row = {**facts, "multiple": float(one.multiple), "length": one.length, "samples": one.samples}
            for name in ("exact_match", "token_accuracy"):
                row |= interval_columns(name, getattr(one, name))
            rows.append(row)
    return rows


def summary_lines(study: Study, page: Path) -> list[str]:
    """One line for each group, and where the tables are."""
    return [*group_lines(group_runs(study.runs)), f"tables: {page}"]


def group_lines(groups: Sequence[Group]) -> list[str]:
    lines = []
    for group in groups:
        cells = "; ".join(f"{one.multiple:g}x {percent_text(rate, 1)}" for one, rate in group.exact_match())
        lines.append(f"{group.task.name}: {group.label}: {cells}")
    return lines
