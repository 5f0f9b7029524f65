"""Measures runs on tasks, or reuses what is kept, and writes the tables: what python -m eval.tasks does."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import torch
from tqdm import tqdm

from common.errors import UsageError
from common.wandb_config import WandbConfig
from data.tokenizer import Tokenizer
from eval.common import provenance
from eval.common.options import check_output
from eval.common.results import result_key, reuse
from eval.common.scoring import Runtime
from eval.common.subjects import Subject, choose_autocast, choose_device, find_subjects
from eval.common.tracking import open_tracker
from eval.generate import open_tokenizer
from eval.reporting.html_page import check_page
from eval.ruler.files import check_tokenizer
from eval.tasks.config import TasksConfig
from eval.tasks.lm_eval_adapter import HarnessModel
from eval.tasks.loading import LoadedTask, load_tasks
from eval.tasks.report import TITLE, score_rows, summary_lines, write_report
from eval.tasks.results import MEASURING, TaskResult, TaskSettings, measure
from eval.tasks.study import RunResult, Study
from eval.tasks.tables import study_records
from model.loading import load_model


def evaluate(
    runs: Sequence[str], output: Path, config: TasksConfig, wandb: WandbConfig, arguments: list[str]
) -> list[str]:
    """Measures every run on every task, or reuses what is kept in output/results, and writes the tables.

    Returns:
        The summary's lines.

    Raises:
        FileNotFoundError, ValueError: what cannot be evaluated, and the way out.
    """
    started = time.monotonic()
    device = choose_device(config.device)
    subjects = find_subjects(runs)
    tracker = open_tracker(wandb, {subject.label: subject.checkpoint.path for subject in subjects}, output)
    ruler = None if config.ruler is None else Path(config.ruler)
    tasks = load_tasks(config.tasks, config.source, ruler, config.lengths, config.limit)
    if config.lengths and not any(task.length for task in tasks):
        raise UsageError(f"lengths is {config.lengths}, but tasks has no task of RULER, whose lengths these are")
    if ruler is not None and any(task.length for task in tasks):
        check_tokenizer(ruler, [subject.checkpoint for subject in subjects])
    check_output(output)
    check_page(output, TITLE)
    check_replaced(output / "tasks.json", {task.group for task in tasks})
    tokenizers = [open_tokenizer(subject.checkpoint, config.tokenizer) for subject in subjects]
    with tqdm(total=len(subjects) * len(tasks), unit="task", smoothing=0) as bar:
        results = [
            _measure_or_reuse(subject, tokenizer, tasks, output, config, device, bar)
            for subject, tokenizer in zip(subjects, tokenizers, strict=True)
        ]
    study = Study(
        runs=results,
        settings=asdict(config),
        **provenance.of_command(arguments, "eval.tasks", device).facts(),
        seconds=round(time.monotonic() - started, 1),
    )
    rows = score_rows(study)
    page, pictures = write_report(study, rows, output)
    tracker.log("eval.tasks", study_records(study, rows, pictures))
    return summary_lines(study, rows, page)


def check_replaced(tables: Path, asked: set[str]) -> None:
    """tables: tasks.json of an output folder. Raises UsageError where it has tasks that are not asked for now."""
    try:
        report = json.loads(tables.read_bytes())
        there = dict.fromkeys(task["group"] for task in report["runs"][0]["tasks"])
        lost = [group for group in there if group not in asked]
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return  # nothing there that could be lost
    if lost:
        some = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        raise UsageError(
            f"--output {tables.parent} has the tables of {some}, which this command would replace: name these tasks "
            "too (what was measured is reused), or choose another --output"
        )


def choose_window(config: TasksConfig, subject: Subject) -> int | None:
    """--max_length, else the training length for rope, whose angles beyond it were never seen, else no limit."""
    if config.max_length is not None:
        return config.max_length
    length: int = subject.checkpoint.require(sequence_length=int)["sequence_length"]
    return length if subject.checkpoint.architecture.positions == "rope" else None


def _measure_or_reuse(
    subject: Subject,
    tokenizer: Tokenizer,
    tasks: Sequence[LoadedTask],
    output: Path,
    config: TasksConfig,
    device: torch.device,
    bar: "tqdm[NoReturn]",
) -> RunResult:
    """Tasks are kept one by one: an interrupted evaluation goes on, and further tasks cost only themselves.

    bar: over the tasks of all runs.
    """
    checkpoint = subject.checkpoint
    window, autocast = choose_window(config, subject), choose_autocast(config.precision, subject, device)
    precision = "float32" if autocast is None else "bfloat16 autocast"
    model: HarnessModel | None = None
    results: list[TaskResult] = []
    for task in tasks:
        bar.set_description(f"{subject.label}, {task.name}")
        settings = TaskSettings(
            task.name, config.limit, config.fewshot, window, config.too_long == "refuse", config.add_bos_token,
            precision, config.row_tokens, config.batch_tokens, config.seed,
        )  # fmt: skip
        kind = provenance.hardware(device)
        key = result_key(checkpoint.path, task.data_hash, settings, 0, kind, MEASURING)
        path = output / "results" / f"{subject.label}-{task.name}-{key}.json"

        def measured(task: LoadedTask = task, settings: TaskSettings = settings) -> TaskResult:
            nonlocal model
            runtime = Runtime(device, autocast, config.row_tokens)
            model = model or _open_model(subject, tokenizer, config, window, runtime)
            model.label = f"{subject.label}, {task.name}"
            return measure(task, model, settings, provenance.now())

        results.append(reuse(path, TaskResult, measured))
        bar.update()
    return RunResult(
        label=subject.label,
        checkpoint=str(checkpoint.path),
        step=checkpoint.step,
        model=checkpoint.meta["model"],
        training_length=int(checkpoint.meta["sequence_length"]),
        trained_with=str(checkpoint.meta.get("code_version", "unknown")),
        window=window,
        precision=precision,
        tasks=results,
    )


def _open_model(
    subject: Subject, tokenizer: Tokenizer, config: TasksConfig, window: int | None, runtime: Runtime
) -> HarnessModel:
    loaded = load_model(subject.checkpoint.path, runtime.device)
    return HarnessModel(
        loaded.model,
        tokenizer,
        runtime,
        window=window,
        refuse=config.too_long == "refuse",
        add_bos_token=config.add_bos_token,
        batch_tokens=config.batch_tokens,
        seed=config.seed,
        label=subject.label,
    )
