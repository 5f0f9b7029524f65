"""Training-free sparse attention on a softmax model against its entmax twin, at equal density.

    python -m eval.sparse_frontier --softmax RUN --entmax RUN --data FOLDER --output FOLDER

Every policy of model/policies is set to each density, and to the entmax model's own, on held-out text (by bisection, on
one context) and measured there beside the softmax model as it is and the entmax model, which keeps the keys that it
gives weight. Policies of the prompt (window, MInference and the like) act on every token of the contexts; policies of
decoding (Quest, SnapKV and the like) on the last tokens, one by one, behind a densely prefilled prompt: they are two
comparisons, each with both models scored on the same tokens. --thresholds adds Block-Sparse FlashAttention as
eval.calibrate found it, --ruler the samples that eval.ruler built for the lengths that are measured.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from common.command_line import CommandParser
from common.errors import run_command
from common.wandb_config import WandbConfig
from eval.common import provenance
from eval.common.options import KEPT, check_output, config_of
from eval.common.subjects import Subject, choose_device, find_subjects
from eval.common.tracking import add_wandb_arguments, open_tracker, wandb_config
from eval.held_out.texts import open_held_out
from eval.reporting.html_page import check_page
from eval.ruler.files import FrozenTask
from eval.sparse_frontier.config import Cell, FrontierConfig, PrefillTime, RulerCell, Study
from eval.sparse_frontier.measure import Measuring
from eval.sparse_frontier.processes import Work, measure_beside
from eval.sparse_frontier.report import TITLE, summarise, summary_lines, write_report
from eval.sparse_frontier.ruler_answers import open_wanted
from eval.sparse_frontier.tables import study_records


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one "error:" line on stderr."""

    def work(given: list[str]) -> list[str]:
        options = _parser().parse_args(given)
        folders = (Path(options.data), Path(options.output))
        config = config_of(FrontierConfig, options)
        return evaluate(options.softmax, options.entmax, *folders, config, wandb_config(options), given)

    return run_command(work, arguments, stopped=KEPT)


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m eval.sparse_frontier", description=__doc__)
    for name in ("softmax", "entmax"):
        text = f"run folder (newest complete checkpoint) or checkpoint of the {name} twin"
        parser.add_argument(f"--{name}", type=str, required=True, help=text)
    parser.add_argument("--data", type=str, required=True, help="prepared corpus with a heldout split")
    parser.add_argument("--output", type=str, default="runs/sparse-frontier", help="folder of the report")
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    default = FrontierConfig()
    for name, kind, text in (
        ("policies", str, "names of model/policies/families.py"),
        ("densities", float, "shares of the visible keys"),
        ("lengths", int, "multiples of the training length"),
        ("ruler_tasks", str, "names of eval.ruler.tasks.RULER_TASKS; all that --ruler has if none is named"),
    ):
        parser.add_argument(f"--{name}", nargs="+", type=kind, default=getattr(default, name), help=text)
    parser.add_class_arguments(FrontierConfig, skip={"policies", "densities", "lengths", "ruler_tasks"})
    add_wandb_arguments(parser)
    return parser


def evaluate(
    softmax: str,
    entmax: str,
    data: Path,
    output: Path,
    config: FrontierConfig,
    wandb: WandbConfig,
    arguments: list[str],
) -> list[str]:
    """Measures every cell, or reuses what is kept in output/results, and writes the report.

    Returns: the summary's lines. Raises FileNotFoundError, ValueError: what cannot be compared, and the way out.
    """
    device = choose_device(config.device)
    subjects = find_subjects([softmax, entmax])
    for subject, wanted in zip(subjects, (False, True), strict=True):
        check_kind(subject, wanted)
    tracker = open_tracker(wandb, {subject.label: subject.checkpoint.path for subject in subjects}, output)
    check_output(output)
    check_page(output, TITLE)
    held_out = open_held_out(data, subjects, config.shared())
    shortest = held_out.plan.multiples[0] * held_out.base_length
    if config.decode_tokens >= shortest:
        raise ValueError(
            f"decode_tokens is {config.decode_tokens}, of contexts of {shortest} tokens: expected fewer, with a prompt"
        )
    sets, not_there = open_wanted(config, subjects, held_out)
    notes = [*differences(subjects), *held_out.plan.notes, *held_out.needle_notes, *not_there]
    measuring = [Measuring(subject, held_out, output, config, device) for subject in subjects]
    cells, ruler, times = _measure(measuring, sets, Work([softmax, entmax], data, output, config))
    study = Study(
        cells=cells,
        ruler=ruler,
        times=times,
        settings=asdict(config),
        base_length=held_out.base_length,
        documents=len(held_out.plan.documents),
        subjects=[subject.label for subject in subjects],
        data=str(data),
        data_fingerprint=held_out.fingerprint,
        precision={one.subject.label: one.precision for one in measuring},
        notes=notes,
        **provenance.of_command(arguments, "eval.sparse_frontier", device).facts(),
    )
    summaries = summarise(study)
    page, pictures = write_report(study, summaries, output)
    tracker.log("eval.sparse_frontier", study_records(study, summaries, pictures))
    return summary_lines(summaries, page)


def _measure(
    measuring: Sequence[Measuring], sets: Sequence[FrozenTask], work: Work
) -> tuple[list[Cell], list[RulerCell], list[PrefillTime]]:
    """measuring: of the softmax model and of entmax, which comes first here: policies are also set to its density.
    work: for what config.processes measure beside each other."""
    softmax_model, entmax_model = measuring
    cells_of_entmax = entmax_model.as_they_are()
    own = {(cell.phase, cell.multiple): round(float(np.mean(cell.density)), 4) for cell in cells_of_entmax}
    ruler_of_entmax = entmax_model.on_ruler(cells_of_entmax, sets)
    times_of_entmax = entmax_model.times({})
    entmax_model.release()
    cells = softmax_model.as_they_are()
    waiting = [place for place in softmax_model.places(own) if not softmax_model.is_kept(place, sets)]
    if work.config.processes > 1 and len(waiting) > 1:
        softmax_model.release()
        measure_beside(work, waiting)
        softmax_model.beside = set(waiting)
    cells += softmax_model.under_policies(own)
    return (
        [*cells, *cells_of_entmax],
        [*softmax_model.on_ruler(cells, sets), *ruler_of_entmax],
        [*softmax_model.times(own), *times_of_entmax],
    )


def differences(subjects: Sequence[Subject]) -> list[str]:
    """A note where the two models differ in more than their attention."""
    first, second = (asdict(one.checkpoint.architecture) for one in subjects)
    unlike = [
        f"{key} {value} and {second[key]}"
        for key, value in first.items()
        if key != "attention" and second[key] != value
    ]
    labels = " and ".join(subject.label for subject in subjects)
    return [f"{labels} are no twins, they differ in: {', '.join(unlike)}."] if unlike else []


def check_kind(subject: Subject, entmax: bool) -> None:
    """Raises ValueError where --softmax and --entmax were given the other kind of model."""
    attention = subject.checkpoint.architecture.attention
    if not (attention.is_entmax if entmax else attention.is_softmax):
        option, expected = ("--entmax", "entmax or asentmax") if entmax else ("--softmax", "softmax or ssmax")
        raise ValueError(
            f"{option} {subject.checkpoint.path} has attention kind {attention.kind!r}: expected {expected}"
        )
