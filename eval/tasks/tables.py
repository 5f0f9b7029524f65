"""The scores of eval.tasks as flat tables: one row a run, task and metric."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from eval.common.tracking import Records
from eval.held_out.analysis import choose_baseline
from eval.reporting.document import Picture
from eval.reporting.tables import interval_columns
from eval.tasks.study import Row, Rows, Study


def study_records(study: Study, rows: Rows, pictures: Sequence[Picture]) -> Records:
    """The tables and the plot, and what they were made of and with."""
    return Records(
        {**study.facts(), "lm_eval": version("lm_eval"), **study.settings},
        study_tables(study, rows),
        list(pictures),
    )


def study_tables(study: Study, rows: Rows) -> dict[str, list[dict[str, Any]]]:
    """Rows by table name."""
    together = {row.task for row in rows.groups}
    # a task that is its group's only one stands in both lists
    shown = [*rows.groups, *(row for row in rows.single if row.task not in together), *rows.means]
    return {
        "scores": [score for row in shown for score in _scores(study, row)],
        "differences": [difference for row in shown for difference in _differences(study, row)],
    }


def _scores(study: Study, row: Row) -> list[dict[str, Any]]:
    """value alone is given for metrics that have no interval."""
    return [
        {
            "run": run.label, "task": row.task, "group": row.group, "length": row.length, "metric": score.metric,
            "chance": row.chance, "samples": score.samples, "left_out": left_out,
            **interval_columns("value", score.interval), "value": score.value,
        }
        for run, score, left_out in zip(study.runs, row.scores, row.left_out, strict=True)
    ]  # fmt: skip


def _differences(study: Study, row: Row) -> list[dict[str, Any]]:
    """ratio: the run divided by the baseline, as of perplexities, instead of the run minus the baseline."""
    baseline = choose_baseline(study.runs).label
    return [
        {
            "run": run.label, "baseline": baseline, "task": row.task, "group": row.group, "length": row.length,
            "metric": one.metric, "samples": one.samples, "ratio": one.ratio,
            **interval_columns("difference", one.interval),
        }
        for run, one in zip(study.runs, row.differences, strict=True) if one is not None
    ]  # fmt: skip
