"""Tables of the tasks: Markdown, one HTML page, and every number as JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from eval.held_out.analysis import attention_kind, choose_baseline
from eval.reporting.document import Block, Details, Heading, Items, Paragraph, Picture, Table, Verdict, pictures_of
from eval.reporting.formatting import count, number_text, percent_text, significant
from eval.reporting.writing import made_by, write_documents
from eval.tasks.figures import scores_by_task
from eval.tasks.results import TaskResult
from eval.tasks.scores import (
    METHODS,
    Difference,
    Score,
    compare,
    compare_means,
    main_metric,
    mean_score,
    merge,
    score_metric,
)
from eval.tasks.study import Row, Rows, Study
from eval.tasks.verdict import score_name, verdict

TITLE = "LongSplash tasks"
MOST_SAID = 12  # scores in a picture's text


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
    single = make_rows(study, tasks) if len(groups) < len(tasks) else []
    return Rows(make_rows(study, groups), single, mean_rows(study, groups))


def mean_rows(study: Study, groups: Sequence[Sequence[TaskResult]]) -> list[Row]:
    """One of each length, over the groups that have a share on every run; none where they are fewer than two."""
    baseline = study.runs.index(choose_baseline(study.runs))
    rows = []
    for length in dict.fromkeys(results[0].length for results in groups):
        alike = [one for one in groups if one[0].length == length and all(main_metric(run) for run in one)]
        if len(alike) < 2:
            continue
        runs = list(zip(*alike, strict=True))
        chances = [one[0].chance for one in alike]
        chance = sum(c for c in chances if c is not None) / len(alike) if None not in chances else None
        differences = [None if i == baseline else compare_means(run, runs[baseline]) for i, run in enumerate(runs)]
        left = [sum(len(one.too_long) for one in run) for run in runs]
        name = f"mean of {len(alike)} tasks"
        rows.append(Row(name, name, length, chance, [mean_score(run) for run in runs], differences, left))
    return rows


def write_report(study: Study, rows: Rows, output: Path) -> tuple[Path, list[Picture]]:
    """Writes tasks.md, tasks.json, report.html and its plot into `output`; returns the page's path and what is pictured
    there."""
    output.mkdir(parents=True, exist_ok=True)
    blocks = _blocks(study, rows, output)
    numbers = _as_json(study, rows)
    page = write_documents(output / "tasks.md", TITLE, [run.label for run in study.runs], blocks, numbers)
    return page, pictures_of(blocks)


def _blocks(study: Study, rows: Rows, output: Path) -> list[Block]:
    limit = study.settings["limit"]
    first = "all samples" if limit is None else f"the first {count(limit, 'sample')} of each task"
    blocks: list[Block] = [
        Heading(TITLE, 1),
        Verdict(verdict(study.runs, rows), score_lines(study, rows)),
        Heading("Scores"),
        *_picture(study, rows.groups, output),
        Paragraph(f"{first[0].upper()}{first[1:]}. {METHODS}"),
    ]
    shown = [*rows.groups, *rows.means]
    plain = [row for row in shown if row.length is None]
    if plain:
        blocks += [Heading("Tasks of lm-eval", 3), _task_table(study, plain)]
    if len(plain) < len(shown):
        long = [row for row in shown if row.length]
        blocks += [Heading("RULER, by length in tokens", 3), _length_table(study, long)]
    alone = [row for row in rows.single if row.length is None]
    if alone:
        blocks += [Details("The groups' tasks", [_task_table(study, alone)])]
    blocks += [Heading("Samples that do not fit"), Items(left_out(study))]
    blocks += [Heading("Runs"), _run_table(study), Details("Data", [_data_table(study)])]
    facts = [f"code {study.code_version}", f"lm_eval {version('lm_eval')}", study.hardware, study.date]
    return [*blocks, *made_by(study.command, [*facts, f"seed {study.settings['seed']}"])]


def _picture(study: Study, rows: Sequence[Row], output: Path) -> list[Block]:
    """Nothing where no score is a share."""
    shares = [row for row in rows if any(score.share and score.interval is not None for score in row.scores)]
    if not shares:
        return []
    labels = [run.label for run in study.runs]
    path = scores_by_task(shares, labels, output / "plots" / "scores.png")
    said = [f"{score_name(row)} {_scores(row, labels)}" for row in shares[:MOST_SAID]]
    more = f" and {len(shares) - MOST_SAID} more" if len(shares) > MOST_SAID else ""
    return [
        Picture(path, "Scores with their 95 % intervals; dashed: chance.", f"Scores by task: {'; '.join(said)}{more}.")
    ]


def _scores(row: Row, labels: Sequence[str]) -> str:
    return ", ".join(f"{label} {score_text(score)}" for label, score in zip(labels, row.scores, strict=True))


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


def _as_json(study: Study, rows: Rows) -> dict[str, Any]:
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
        "scores": [asdict(row) for row in [*rows.groups, *rows.single]],
        "means": [asdict(row) for row in rows.means],
    }


def summary_lines(study: Study, rows: Rows, page: Path) -> list[str]:
    """One line for each task and metric, what does not fit, and where the tables are."""
    return [
        *score_lines(study, rows),
        *left_out(study),
        f"Evaluated in {study.seconds:.0f} s; tables: {page}",
    ]


def score_lines(study: Study, rows: Rows) -> list[str]:
    """One for each task and metric, groups as a whole, and for each mean over tasks."""
    lines = []
    for row in [*rows.groups, *rows.means]:
        scores = zip(study.runs, row.scores, strict=True)
        cells = "; ".join(f"{run.label} {score_text(score)}" for run, score in scores)
        lines.append(f"{score_name(row)}: {cells}")
    return lines
