"""The numbers of eval.sparse_frontier as flat tables: one row a way of attending, in one phase and at one length."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from eval.common.tracking import Records
from eval.reporting.document import Picture
from eval.reporting.tables import interval_columns
from eval.sparse_frontier.config import PrefillTime, Study
from eval.sparse_frontier.report import Summaries, Summary
from eval.sparse_frontier.ruler_report import RulerSummary


def study_records(study: Study, summaries: Summaries, pictures: Sequence[Picture]) -> Records:
    """The tables and plots, and what they were made of and with."""
    facts = {"data": study.data, **study.facts(), "notes": study.notes, **study.settings}
    return Records(facts, study_tables(study, summaries), list(pictures))


def study_tables(study: Study, summaries: Summaries) -> dict[str, list[dict[str, Any]]]:
    """Rows by table name."""
    return {
        "cells": [_cell(one) for one in summaries.cells],
        "ruler": [_ruler(one) for one in summaries.ruler],
        "ruler_tasks": [row for one in summaries.ruler for row in _ruler_tasks(one)],
        "prefill_times": [_time(one) for one in study.times],
    }


def _cell(one: Summary) -> dict[str, Any]:
    """Needles: shares of value tokens right, and of values; controls are samples without their needle."""
    cell = one.cell
    return {
        "run": cell.label, "method": cell.method, "phase": cell.phase, "multiple": cell.multiple,
        "context": cell.context, "wanted": cell.wanted, "policy": cell.policy,
        "density": one.density, "tile_density": one.tile_density, "scored_tokens": sum(cell.tokens),
        **interval_columns("perplexity", one.perplexity), **interval_columns("perplexity_ratio", one.ratio),
        "needle_density": cell.needle_density, "needle_samples": len(cell.needles),
        **interval_columns("needle_token_accuracy", one.needles),
        **interval_columns("needle_exact_match", one.exact),
        **interval_columns("several_needles_token_accuracy", one.several),
        **interval_columns("control_token_accuracy", one.chance),
    }  # fmt: skip


def _way(one: RulerSummary) -> dict[str, Any]:
    return {name: getattr(one, name) for name in ("method", "phase", "multiple", "context", "wanted")}


def _ruler(one: RulerSummary) -> dict[str, Any]:
    """The mean over tasks."""
    return {
        **_way(one), "tasks": len(one.tasks), "samples": one.samples, "density": one.density,
        **interval_columns("accuracy", one.accuracy), **interval_columns("difference", one.difference),
    }  # fmt: skip


def _ruler_tasks(one: RulerSummary) -> list[dict[str, Any]]:
    return [
        {
            **_way(one), "task": task, "samples": one.samples // len(one.tasks), "density": one.densities[task],
            **interval_columns("accuracy", accuracy),
        }
        for task, accuracy in one.tasks.items()
    ]  # fmt: skip


def _time(one: PrefillTime) -> dict[str, Any]:
    """shortest and longest: of the timed runs, no interval."""
    milliseconds = [1e3 * second for second in one.seconds]
    return {
        "run": one.label, "method": one.method, "context": one.context, "wanted": one.wanted, "policy": one.policy,
        "timed_runs": len(milliseconds), "milliseconds": median(milliseconds),
        "milliseconds_shortest": min(milliseconds), "milliseconds_longest": max(milliseconds),
    }  # fmt: skip
