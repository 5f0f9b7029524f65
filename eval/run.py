"""Compares trained checkpoints on held-out text: python -m eval.run RUN [RUN ...] --data FOLDER --output FOLDER"""

from common.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # the imports take seconds

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from common.command_line import CommandParser
from common.errors import run_command
from common.nested import flatten
from common.wandb_config import WandbConfig
from eval.common import provenance
from eval.common.metrics import read_metrics
from eval.common.options import KEPT, check_output, config_of
from eval.common.subjects import Subject, choose_device, find_subjects, with_dual_chunk
from eval.common.tracking import Records, add_wandb_arguments, open_tracker, wandb_config
from eval.held_out.analysis import choose_baseline, pair, summarise
from eval.held_out.config import EvalConfig
from eval.held_out.measurement import measure_or_reuse
from eval.held_out.report import TITLE, Study, summary_lines, write_report
from eval.held_out.seeds import compare_seeds
from eval.held_out.tables import study_tables
from eval.held_out.texts import open_held_out
from eval.reporting.html_page import check_page


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one "error:" line on stderr."""

    def work(given: list[str]) -> list[str]:
        options = _parser().parse_args(given)
        config, wandb = config_of(EvalConfig, options), wandb_config(options)
        return evaluate(options.runs, Path(options.data), Path(options.output), config, wandb, given)

    return run_command(work, arguments, stopped=KEPT)


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m eval.run", description=__doc__)
    parser.add_argument("runs", nargs="+", type=str, help="run folders (newest complete checkpoint) or checkpoints")
    parser.add_argument("--data", type=str, required=True, help="prepared corpus with a heldout split")
    parser.add_argument("--output", type=str, default="runs/report", help="folder of the report")
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=EvalConfig().lengths, help="multiples of the training length"
    )
    parser.add_class_arguments(EvalConfig, skip={"lengths"})
    add_wandb_arguments(parser)
    return parser


def evaluate(
    runs: Sequence[str],
    data: Path,
    output: Path,
    config: EvalConfig,
    wandb: WandbConfig,
    arguments: list[str],
    module: str = "eval.run",
) -> list[str]:
    """Measures every run, or reuses what is kept in output/results, and writes the report.

    Args:
        arguments, module: of the command that asked for it, which the report shows.

    Returns:
        The summary's lines.

    Raises:
        FileNotFoundError, ValueError: what cannot be evaluated, and the way out.
    """
    started = time.monotonic()
    device = choose_device(config.device)
    subjects = with_dual_chunk(find_subjects(runs), config.dual_chunk)
    kinds = [subject.checkpoint.architecture.attention.kind for subject in subjects]
    if config.thresholds is not None and not any(
        subject.checkpoint.architecture.attention.is_softmax for subject in subjects
    ):
        raise ValueError(f"thresholds is {config.thresholds!r}, but no run is a softmax model: they are {kinds}")
    tracker = open_tracker(wandb, {subject.label: subject.checkpoint.path for subject in subjects}, output)
    check_output(output)
    check_page(output, TITLE)
    held_out = open_held_out(data, subjects, config)
    measurements = [measure_or_reuse(subject, held_out, output, config, device) for subject in subjects]
    own = [one for one, subject in zip(measurements, subjects, strict=True) if subject.dual_chunk is None]
    baseline = choose_baseline(own)
    settings = {subject.label: _settings(subject) for subject in subjects}
    study = Study(
        config=config,
        measurements=measurements,
        runs=[summarise(one) for one in measurements],
        pairs=[pair(one, baseline) for one in measurements if one is not baseline],
        seeds=compare_seeds(own, settings),
        settings=settings,
        metrics={one.label: read_metrics(one.run_dir) for one in subjects if one.dual_chunk is None},
        base_length=held_out.base_length,
        data=str(data),
        data_fingerprint=held_out.fingerprint,
        **provenance.of_command(arguments, module, device).facts(),
        notes=[
            *held_out.plan.notes,
            *held_out.needle_notes,
            *(f"{one.label}: {one.policy}" for one in measurements if one.policy),
        ],
        seconds=time.monotonic() - started,
    )
    page, pictures = write_report(study, output)
    facts = {"data": study.data, **study.facts(), "notes": study.notes, **asdict(config)}
    tracker.log(module, Records(facts, study_tables(study), pictures))
    return summary_lines(study, page)


def _settings(subject: Subject) -> dict[str, str]:
    settings = provenance.run_settings(subject.checkpoint.path)
    # Without its run folder a checkpoint still records its model.
    flat = flatten(settings or {"model": {"network": subject.checkpoint.meta["model"]}})
    return {name: str(value) for name, value in flat.items()}


if __name__ == "__main__":
    sys.exit(main())
