"""Tables of the tasks: Markdown, one HTML page, and every number as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common.files import write_file, write_json
from eval.held_out.analysis import attention_kind, choose_baseline
from eval.reporting.formatting import count, number_text, percent_text, significant
from eval.reporting.html_report import Block, Code, Heading, Items, Paragraph, Table, to_html, to_markdown
from eval.tasks.results import TaskResult
from eval.tasks.scores import METHODS, Difference, Score, compare, merge, score_metric

TITLE = "LongSplash tasks"


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
class Study:
    """All that the tables are made of. settings: of the evaluation. seconds: reused results not counted."""

    runs: list[RunResult]
    settings: dict[str, Any]
    code_version: str
    command: str
    hardware: str
    date: str
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
    """groups: the tasks of a group together. single: every task by itself; empty where no group has several."""

    groups: list[Row]
    single: list[Row]


def make_rows(study: Study, tasks: Sequence[Sequence[TaskResult]]) -> list[Row]:
    """tasks: of every task its results, one a run. Raises ValueError where runs cannot be paired."""
    baseline = study.runs.index(choose_baseline(study.runs))
    rows = []
    for results in tasks:
        names = list(dict.fromkeys(metric.name for result in results for metric in result.metrics))
        for name in names:
            metrics = [next((m for m in result.metrics if m.name == name), None) for result in results]
            scores = [
                Score(name, 0, None, None, True) if metric is None else score_metric(metric) for metric in metrics
            ]
            differences = [
                None if i == baseline else compare(result, results[baseline], name) for i, result in enumerate(results)
            ]
            first, left = results[0], [len(result.too_long) for result in results]
            rows.append(Row(first.task, first.group, first.length, first.chance, scores, differences, left))
    return rows


def by_task(study: Study) -> list[list[TaskResult]]:
    return [list(results) for results in zip(*(run.tasks for run in study.runs), strict=True)]


def by_group(study: Study) -> list[list[TaskResult]]:
    """As by_task, with the tasks of a group together; RULER's lengths stay apart."""
    merged = []
    for run in study.runs:
        groups: dict[tuple[str, int | None], list[TaskResult]] = {}
        for task in run.tasks:
            groups.setdefault((task.group, task.length), []).append(task)
        merged.append([merge(results) for results in groups.values()])
    return [list(results) for results in zip(*merged, strict=True)]


def score_rows(study: Study) -> Rows:
    """Computed once for report, tables and summary."""
    groups, tasks = by_group(study), by_task(study)
    return Rows(make_rows(study, groups), make_rows(study, tasks) if len(groups) < len(tasks) else [])


def write_report(study: Study, rows: Rows, output: Path) -> Path:
    """Writes tasks.md, tasks.html and tasks.json into `output`; returns the HTML page's path."""
    output.mkdir(parents=True, exist_ok=True)
    blocks = _blocks(study, rows.groups, rows.single)
    write_file(output / "tasks.md", to_markdown(blocks, output).encode())
    page = output / "tasks.html"
    write_file(page, to_html(f"{TITLE}: {' and '.join(run.label for run in study.runs)}", blocks).encode())
    write_json(output / "tasks.json", _as_json(study, [*rows.groups, *rows.single]))
    return page


def _blocks(study: Study, rows: Sequence[Row], single: Sequence[Row]) -> list[Block]:
    limit = study.settings["limit"]
    first = "all samples" if limit is None else f"the first {count(limit, 'sample')} of each task"
    blocks: list[Block] = [Heading(TITLE, 1), Paragraph(f"{first[0].upper()}{first[1:]}. {METHODS}")]
    plain = [row for row in rows if row.length is None]
    if plain:
        blocks += [Heading("Tasks of lm-eval"), _task_table(study, plain)]
    if len(plain) < len(rows):
        blocks += [Heading("RULER, by length in tokens"), _length_table(study, [row for row in rows if row.length])]
    if single:
        blocks += [Heading("The groups' tasks"), _task_table(study, [row for row in single if row.length is None])]
    blocks += [Heading("Samples that do not fit"), Items(left_out(study))]
    blocks += [Heading("Runs"), _run_table(study), Heading("Data"), _data_table(study)]
    facts = [f"code {study.code_version}", f"lm_eval {version('lm_eval')}", study.hardware, study.date]
    return [*blocks, Heading("Made by"), Code(study.command), Items([*facts, f"seed {study.settings['seed']}"])]


def score_text(score: Score) -> str:
    if score.value is None:
        return "no sample fits"
    if score.interval is None:
        return f"{significant(score.value)} (no interval)"
    return percent_text(score.interval, 1) if score.share else number_text(score.interval)


def difference_text(difference: Difference | None, share: bool) -> str:
    if difference is None:
        return ""
    if difference.ratio:
        return f"times {number_text(difference.interval)}"
    return percent_text(difference.interval, 1) if share else number_text(difference.interval)


def _others(study: Study) -> tuple[str, list[int]]:
    """The baseline's label, and the places of the other runs."""
    baseline = choose_baseline(study.runs)
    return baseline.label, [i for i, run in enumerate(study.runs) if run is not baseline]


def _task_table(study: Study, rows: Sequence[Row]) -> Table:
    baseline, others = _others(study)
    header = ["task", "metric", "samples", "chance", *(run.label for run in study.runs)]
    header += [f"{study.runs[i].label} against {baseline}" for i in others]
    cells = []
    for row in rows:
        samples = " / ".join(dict.fromkeys(str(score.samples) for score in row.scores))
        chance = "" if row.chance is None else f"{100 * row.chance:.1f} %"
        scores = [score_text(score) for score in row.scores]
        against = [difference_text(row.differences[i], row.scores[i].share) for i in others]
        cells.append([row.task, row.scores[0].metric, samples, chance, *scores, *against])
    return Table(header, cells)


def _length_table(study: Study, rows: Sequence[Row]) -> Table:
    """A line for each task and run, and for each run against the baseline; a column for each length."""
    baseline, others = _others(study)
    lengths = sorted({row.length for row in rows if row.length is not None})
    cells = []
    for group in dict.fromkeys(row.group for row in rows):
        at = {row.length: row for row in rows if row.group == group}
        for i, run in enumerate(study.runs):
            cells.append([group, run.label, *(score_text(at[n].scores[i]) if n in at else "" for n in lengths)])
        for i in others:
            texts = [difference_text(at[n].differences[i], True) if n in at else "" for n in lengths]
            cells.append([group, f"{study.runs[i].label} against {baseline}", *texts])
    return Table(["task", "run", *(f"{length:,}" for length in lengths)], cells)


def left_out(study: Study) -> list[str]:
    """A line for each run and task with samples that do not fit."""
    lines = [
        f"{run.label}, {task.task}: {len(task.too_long)} of {task.documents} samples do not fit {run.window:,} tokens "
        "and are left out"
        for run in study.runs
        for task in run.tasks
        if task.too_long and run.window is not None
    ]
    return lines or ["Every sample fits the window of its run."]


def _run_table(study: Study) -> Table:
    header = ["run", "attention", "step", "training length", "window", "precision", "checkpoint"]
    rows = [
        [
            run.label, attention_kind(run), f"{run.step:,}", f"{run.training_length:,}",
            "none" if run.window is None else f"{run.window:,}", run.precision, run.checkpoint,
        ]
        for run in study.runs
    ]  # fmt: skip
    return Table(header, rows, numeric=False)


def _data_table(study: Study) -> Table:
    rows = [
        [one.task, one.source, f"{one.documents:,}", one.data_hash[:12], one.prompt_hash[:12]]
        for one in study.runs[0].tasks
    ]
    return Table(["task", "source", "samples", "sha256 of the data", "of the requests"], rows, numeric=False)


def _as_json(study: Study, rows: Sequence[Row]) -> dict[str, Any]:
    """The scores and where they come from; the samples' values stay in results/."""
    facts = {key: value for key, value in vars(study).items() if key != "runs"}
    dropped = {"metrics", "texts", "scored"}
    runs = [
        {
            **{key: value for key, value in vars(run).items() if key != "tasks"},
            "tasks": [{k: v for k, v in vars(task).items() if k not in dropped} for task in run.tasks],
        }
        for run in study.runs
    ]
    return {
        **facts,
        "lm_eval": version("lm_eval"),
        "baseline": choose_baseline(study.runs).label,
        "runs": runs,
        "scores": [asdict(row) for row in rows],
    }


def summary_lines(study: Study, rows: Rows, page: Path) -> list[str]:
    """One line for each task and metric, what does not fit, and where the tables are."""
    lines = []
    for row in rows.groups:
        scores = zip(study.runs, row.scores, strict=True)
        cells = "; ".join(f"{run.label} {score_text(score)}" for run, score in scores)
        lines.append(f"{row.task} {row.scores[0].metric}: {cells}")
    return [*lines, *left_out(study), f"Evaluated in {study.seconds:.0f} s; tables: {page}"]
