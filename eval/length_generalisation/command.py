"""Scores runs of configs/length_generalisation beyond their training length.

    python -m eval.length_generalisation RUN [RUN ...] --output FOLDER --lengths 1 2 4 8

A sample counts when greedy decoding gives its whole target and then <eos>. That is decided by one forward pass over
the true sequence, exactly: greedy decoding produces a sequence if and only if, at every place of it, the model's first
choice behind the true tokens before is the true token. (If: by induction, what was decoded so far is the true prefix.
Only if: at the first place where the choice is another token, decoding leaves the sequence.)

Runs with the same task, training lengths and architecture are one group: the seeds of one experiment.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from common.command_line import CommandParser
from common.errors import run_command
from common.wandb_config import WandbConfig
from data.length_generalisation import TaskConfig
from eval.common import provenance
from eval.common.options import KEPT, check_output, config_of
from eval.common.results import result_key, reuse
from eval.common.scoring import Runtime
from eval.common.subjects import Subject, choose_autocast, choose_device, find_subjects
from eval.common.tracking import Records, add_wandb_arguments, open_tracker, wandb_config
from eval.length_generalisation.measure import LengthConfig, LengthResult, length_of, measure
from eval.length_generalisation.report import TITLE, RunResult, Study, result_rows, summary_lines, write_report
from eval.reporting.html_page import check_page
from model.loading import LoadedModel, load_model

MEASURING = ("eval.length_generalisation.measure",)  # with all that it imports: what decides the numbers


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one "error:" line on stderr."""

    def work(given: list[str]) -> list[str]:
        options = _parser().parse_args(given)
        config = config_of(LengthConfig, options)
        return evaluate(options.runs, Path(options.output), config, wandb_config(options), given)

    return run_command(work, arguments, stopped=KEPT)


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m eval.length_generalisation", description=__doc__)
    parser.add_argument("runs", nargs="+", type=str, help="run folders (newest complete checkpoint) or checkpoints")
    parser.add_argument("--output", type=str, default="runs/length-generalisation", help="folder of the tables")
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument(
        "--lengths", nargs="+", type=float, default=LengthConfig().lengths, help="multiples of the training length"
    )
    parser.add_class_arguments(LengthConfig, skip={"lengths"})
    add_wandb_arguments(parser)
    return parser


def evaluate(
    runs: Sequence[str], output: Path, config: LengthConfig, wandb: WandbConfig, arguments: list[str]
) -> list[str]:
    """Measures every run at every length, or reuses what is kept in output/results, and writes the tables and the plot.

    Returns:
        The summary's lines.

    Raises:
        FileNotFoundError, ValueError: what cannot be evaluated, and the way out.
    """
    device = choose_device(config.device)
    subjects = find_subjects(runs)
    tracker = open_tracker(wandb, {subject.label: subject.checkpoint.path for subject in subjects}, output)
    tasks = [find_task(subject) for subject in subjects]
    for task in tasks:
        for multiple in config.lengths:
            length_of(task, multiple)
    check_output(output)
    check_page(output, TITLE)
    results = [
        _measure_or_reuse(subject, task, output, config, device) for subject, task in zip(subjects, tasks, strict=True)
    ]
    study = Study(
        runs=results,
        settings=asdict(config),
        **provenance.of_command(arguments, "eval.length_generalisation", device).facts(),
    )
    page, picture = write_report(study, output)
    records = Records({**study.facts(), **study.settings}, {"exact_match": result_rows(study)}, [picture])
    tracker.log("eval.length_generalisation", records)
    return summary_lines(study, page)


def find_task(subject: Subject) -> TaskConfig:
    """The task that a run was trained on, from its config.yaml.

    Raises:
        ValueError: there is none, or the task's samples were other ones then.
    """
    path = subject.checkpoint.path
    settings = provenance.run_settings(path)
    if not settings:
        raise ValueError(f"{path} does not lie in its run folder, whose config.yaml says the task: pass the run folder")
    found = (settings.get("data") or {}).get("task") or {}
    if not found.get("name"):
        raise ValueError(
            f"{subject.run_dir} was not trained on a task of configs/length_generalisation: use python -m eval.run"
        )
    task = TaskConfig(**found)
    trained, current = subject.checkpoint.tokenizer["fingerprint"], task.task.fingerprint
    if trained != current:
        raise ValueError(
            f"{path} was trained on task {task.name} as of {trained[:12]}, this code has {current[:12]}: its samples "
            "have changed; evaluate with the code version that trained it"
        )
    return task


def _measure_or_reuse(
    subject: Subject, task: TaskConfig, output: Path, config: LengthConfig, device: torch.device
) -> RunResult:
    """Lengths are kept one by one: an interrupted evaluation goes on, and further lengths cost only themselves."""
    path, meta = subject.checkpoint.path, subject.checkpoint.meta
    autocast = choose_autocast(config.precision, subject, device)
    loaded: LoadedModel | None = None
    results = []
    for multiple in config.lengths:
        length = length_of(task, multiple)
        settings = replace(config, lengths=[multiple])
        key = result_key(path, task.task.fingerprint, settings, length, provenance.hardware(device), MEASURING)
        place = output / "results" / f"{subject.label}-{length}-{key}.json"

        def measured(length: int = length, multiple: float = multiple) -> LengthResult:
            nonlocal loaded
            loaded = loaded or load_model(path, device)
            runtime = Runtime(device, autocast, config.row_tokens)
            return measure(loaded.model, task.task, length, multiple, config, runtime, subject.label)

        results.append(reuse(place, LengthResult, measured))
    planned = (provenance.run_settings(path).get("trainer") or {}).get("max_steps")
    return RunResult(
        label=subject.label,
        checkpoint=str(path),
        step=subject.checkpoint.step,
        planned_steps=planned,
        seed=(provenance.run_settings(path).get("data") or {}).get("seed"),
        task=task,
        model=meta["model"],
        precision="float32" if autocast is None else "bfloat16 autocast",
        trained_with=str(meta.get("code_version", "unknown")),
        lengths=results,
    )
