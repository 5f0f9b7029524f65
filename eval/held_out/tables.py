"""The numbers of an evaluation as flat tables: one row a measured thing, intervals as three columns."""

from typing import Any

from eval.held_out.analysis import NeedleScore, RunSummary, attention_kind
from eval.held_out.measurement import Measurement
from eval.held_out.report import Study
from eval.reporting.tables import interval_columns


def study_tables(study: Study) -> dict[str, list[dict[str, Any]]]:
    """Rows by table name."""
    pairs = list(zip(study.runs, study.measurements, strict=True))
    return {
        "runs": [_run(run, measurement) for run, measurement in pairs],
        "pairs": [
            {
                "run": one.label, "baseline": one.baseline, "multiple": length.multiple,
                **interval_columns("perplexity_ratio", length.perplexity_ratio),
                **interval_columns("bits_per_byte_difference", length.bits_per_byte_difference),
            }
            for one in study.pairs for length in one.lengths
        ],
        "perplexity_over_length": [
            {
                "run": run.label, "multiple": one.multiple, "tokens": one.tokens,
                **interval_columns("perplexity", one.perplexity),
                **interval_columns("bits_per_byte", one.bits_per_byte),
            }
            for run in study.runs for one in run.lengths
        ],
        "perplexity_by_position": [
            {"run": run.label, "start": one.start, "stop": one.stop, **interval_columns("perplexity", one.perplexity)}
            for run in study.runs for one in run.positions
        ],
        "needles": [row for run in study.runs for row in _needles(run)],
        "attention": [row for measurement in study.measurements for row in _attention(measurement, study.base_length)],
    }  # fmt: skip


def _run(run: RunSummary, measurement: Measurement) -> dict[str, Any]:
    return {
        "run": run.label, "attention": attention_kind(measurement), "parameters": measurement.parameters,
        "step": measurement.step, "training_length": measurement.training_length, "scored_tokens": run.tokens,
        **interval_columns("bits_per_byte", run.bits_per_byte), **interval_columns("perplexity", run.perplexity),
    }  # fmt: skip


def _needles(run: RunSummary) -> list[dict[str, Any]]:
    """depth is None for controls and for several needles at random depths."""

    def row(kind: str, one: NeedleScore) -> dict[str, Any]:
        return {
            "run": run.label, "kind": kind, "multiple": one.multiple,
            "depth": one.depth if isinstance(one.depth, float) else None, "samples": one.samples,
            **interval_columns("token_accuracy", one.token_accuracy),
            **interval_columns("exact_match", one.exact_match),
        }  # fmt: skip

    single = [row("single" if one.depth is not None else "without needle", one) for one in run.needles]
    return single + [row(kind, one) for kind, scores in run.several.items() for one in scores]


def _attention(measurement: Measurement, base_length: int) -> list[dict[str, Any]]:
    """One row a head."""
    names = ("support", "live_share", "entropy", "relative_entropy", "sink_share", "alpha", "temperature")
    return [
        {
            "run": measurement.label, "multiple": one.multiple, "tokens": one.multiple * base_length,
            "layer": one.layer, "head": head,
            **{name: None if (values := getattr(one, name)) is None else values[head] for name in names},
        }
        for one in measurement.attention for head in range(len(one.support))
    ]  # fmt: skip
