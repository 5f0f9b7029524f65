"""Compares trained checkpoints on held-out text: python -m eval.run RUN [RUN ...] --data FOLDER --output FOLDER"""

import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

from common.command_line import CommandParser
from common.errors import run_command
from data.store import TokenStore
from data.tokenizer import Tokenizer
from eval import provenance
from eval.analysis import choose_baseline, pair, summarise
from eval.attention_profile import measure_attention
from eval.config import EvalConfig
from eval.metrics import Series, read_metrics
from eval.multi_needle import MultiNeedleSample, build_multi_samples, measure_multi_needles
from eval.needle import NeedleSample, build_samples, measure_needles
from eval.options import KEPT, check_output, config_of
from eval.perplexity import PerplexityPlan, bytes_of_tokens, measure_perplexity, plan_perplexity
from eval.report import Study, summary_lines, write_report
from eval.results import Measurement, load_measurement, result_key, save_measurement
from eval.scoring import Runtime
from eval.tables import study_tables
from eval.tracking import Records, WandbConfig, add_wandb_arguments, open_tracker, wandb_config
from model.checkpoint import CheckpointInfo, load_model, resolve_checkpoint
from model.policies.bsfa import use_thresholds
from model.policies.thresholds import read_thresholds
from model.version import code_version

T = TypeVar("T")


@dataclass(frozen=True)
class Subject:
    """One checkpoint to evaluate, with the label it has in the report."""

    label: str
    checkpoint: CheckpointInfo

    @property
    def run_dir(self) -> Path:
        return self.checkpoint.path.resolve().parent.parent


@dataclass(frozen=True)
class HeldOut:
    """Held-out text, its tokenizer, and what of it every model is scored on."""

    store: TokenStore
    tokenizer: Tokenizer
    fingerprint: str
    base_length: int
    plan: PerplexityPlan
    samples: list[NeedleSample]
    multi_samples: list[MultiNeedleSample]
    needle_notes: list[str]


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
    subjects = find_subjects(runs)
    kinds = [subject.checkpoint.architecture.attention.kind for subject in subjects]
    if config.thresholds is not None and not {"softmax", "ssmax"} & set(kinds):
        raise ValueError(f"thresholds is {config.thresholds!r}, but no run is a softmax model: they are {kinds}")
    tracker = open_tracker(wandb, {subject.label: subject.checkpoint.path for subject in subjects}, output)
    check_output(output)
    held_out = open_held_out(data, subjects, config)
    measurements = [_measure_or_reuse(subject, held_out, output, config, device) for subject in subjects]
    baseline = choose_baseline(measurements)
    study = Study(
        config=config,
        measurements=measurements,
        runs=[summarise(one) for one in measurements],
        pairs=[pair(one, baseline) for one in measurements if one is not baseline],
        settings={subject.label: _settings(subject) for subject in subjects},
        metrics={subject.label: _metrics(subject) for subject in subjects},
        base_length=held_out.base_length,
        data=str(data),
        data_fingerprint=held_out.fingerprint,
        code_version=code_version(),
        command=provenance.command_line(arguments, module),
        hardware=provenance.hardware(device),
        date=provenance.now(),
        notes=[
            *held_out.plan.notes,
            *held_out.needle_notes,
            *(f"{one.label}: {one.policy}" for one in measurements if one.policy),
        ],
        seconds=time.monotonic() - started,
    )
    page, pictures = write_report(study, output)
    facts = {name: getattr(study, name) for name in ("data", "code_version", "command", "hardware", "date", "notes")}
    tracker.log(module, Records({**facts, **asdict(config)}, study_tables(study), pictures))
    return summary_lines(study, page)


def choose_device(name: str) -> torch.device:
    """Raises ValueError for a device that torch does not know or does not find."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}: expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ValueError(f"device is {name!r}, but torch finds {found} CUDA devices: use --device cpu")
    return device


def find_subjects(runs: Sequence[str]) -> list[Subject]:
    """Resolves run folders and checkpoints and labels them: the run's name, then the step or the parent where needed.

    Raises:
        FileNotFoundError, ValueError: as model.checkpoint.resolve_checkpoint, or the same checkpoint given twice.
    """
    found = [resolve_checkpoint(run) for run in runs]
    folders = [checkpoint.path.resolve() for checkpoint in found]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ValueError(f"checkpoint {folder} is given twice: give different runs or checkpoints")
    # A checkpoint may lie outside a run's checkpoints/ folder: its own name then is the label.
    names = [f.parent.parent.name if f.parent.name == "checkpoints" else f.name for f in folders]
    steps = [f"{name}@{one.step}" if names.count(name) > 1 else name for name, one in zip(names, found, strict=True)]
    labels = [
        f"{f.parent.parent.parent.name}-{label}" if steps.count(label) > 1 else label
        for f, label in zip(folders, steps, strict=True)
    ]
    if len(set(labels)) < len(labels):
        raise ValueError(f"the runs have the labels {', '.join(labels)}: rename their folders so that they differ")
    return [Subject(label, checkpoint) for label, checkpoint in zip(labels, found, strict=True)]


def open_held_out(data: Path, subjects: Sequence[Subject], config: EvalConfig) -> HeldOut:
    """Opens the held-out split, checks that it fits every checkpoint, and plans what is scored."""
    store = TokenStore(data / "heldout", verify="size")
    for subject in subjects:
        check_tokenizer(subject, data, store)
    base_length = config.base_length or _common_length(subjects)
    plan = plan_perplexity(store, base_length, config)
    tokenizer = Tokenizer(store.tokenizer_path)
    samples, notes = build_samples(store, tokenizer, base_length, plan.multiples, config)
    several, more_notes = build_multi_samples(store, tokenizer, base_length, plan.multiples, config)
    fingerprint = data_fingerprint(data)
    return HeldOut(store, tokenizer, fingerprint, base_length, plan, samples, several, [*notes, *more_notes])


def check_tokenizer(subject: Subject, data: Path, store: TokenStore) -> None:
    """Raises ValueError where a split was prepared with another tokenizer than the checkpoint's."""
    tokenizer = subject.checkpoint.tokenizer
    if tokenizer["fingerprint"] != store.fingerprint_of_tokenizer:
        raise ValueError(
            f"{subject.checkpoint.path} was trained with tokenizer {tokenizer['fingerprint'][:12]} "
            f"({tokenizer['path']}), but {data} was prepared with {store.fingerprint_of_tokenizer[:12]}: pass the "
            "--data folder that the run was trained on"
        )


def data_fingerprint(data: Path) -> str:
    """sha256 over the manifest and the held-out shards' records, which hold the checksums of their tokens."""
    digest = hashlib.sha256((data / "manifest.json").read_bytes())
    for path in sorted((data / "heldout").glob("*.json")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def file_fingerprint(path: Path) -> str:
    """sha256. Raises FileNotFoundError."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _common_length(subjects: Sequence[Subject]) -> int:
    lengths = {
        subject.label: subject.checkpoint.require(sequence_length=int)["sequence_length"] for subject in subjects
    }
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{label} {length}" for label, length in lengths.items())
        raise ValueError(f"the runs were trained at different lengths ({said}): say which is 1x with --base_length")
    return next(iter(lengths.values()))


def _measure_or_reuse(
    subject: Subject, held_out: HeldOut, output: Path, config: EvalConfig, device: torch.device
) -> Measurement:
    kind = provenance.hardware(device)
    # settings hold the name of the thresholds' file, not what is in it
    read = held_out.fingerprint + (file_fingerprint(Path(config.thresholds)) if config.thresholds else "")
    key = result_key(subject.checkpoint.path, read, config, held_out.base_length, kind)
    path = output / "results" / f"{subject.label}-{key}.json"
    if path.is_file():
        tqdm.write(f"{subject.label}: reusing {path}", file=sys.stderr)
        return load_measurement(path)
    measurement = measure(subject, held_out, config, device)
    save_measurement(path, measurement)
    return measurement


def measure(subject: Subject, held_out: HeldOut, config: EvalConfig, device: torch.device) -> Measurement:
    """Runs every task on one checkpoint."""
    loaded = load_model(subject.checkpoint.path, device)
    autocast = choose_autocast(config.precision, subject, device)
    runtime = Runtime(device, autocast, config.row_tokens)
    seconds: dict[str, float] = {}
    store, plan, label, model = held_out.store, held_out.plan, subject.label, loaded.model
    token_bytes = bytes_of_tokens(held_out.tokenizer)
    chosen = (None, None) if loaded.config.attention.is_entmax else (config.thresholds, config.keep_blocks)
    with use_thresholds(model, *chosen) as record:
        perplexity = _timed(
            seconds, "perplexity", lambda: measure_perplexity(model, store, plan, token_bytes, runtime, label)
        )
        needles = _timed(seconds, "needles", lambda: measure_needles(model, held_out.samples, runtime, label))
        multi_needles = _timed(
            seconds, "several needles", lambda: measure_multi_needles(model, held_out.multi_samples, runtime, label)
        )
    policy = "" if record is None else _describe(*chosen, float(record.density("prefill").mean()))
    documents, length = plan.documents[: config.profile_documents], held_out.base_length
    attention = _timed(
        seconds,
        "attention",
        lambda: measure_attention(model, store, documents, plan.multiples, length, config, runtime, label),
    )
    meta = subject.checkpoint.meta
    return Measurement(
        label=label,
        checkpoint=str(subject.checkpoint.path),
        step=loaded.step,
        training={name: meta.get(name) for name in ("samples", "tokens", "code_version", "created")},
        model=asdict(loaded.config),
        parameters=sum(parameter.numel() for parameter in loaded.model.parameters()),
        policy=policy,
        training_length=loaded.training_length,
        precision="float32" if autocast is None else "bfloat16 autocast",
        hardware=provenance.hardware(device),
        date=provenance.now(),
        seconds=seconds,
        plan=plan,
        perplexity=perplexity,
        needles=needles,
        multi_needles=multi_needles,
        needle_notes=held_out.needle_notes,
        attention=attention,
    )


def _describe(path: str | None, k: int | None, density: float) -> str:
    assert path is not None and k is not None
    calibration = read_thresholds(Path(path))[1]
    predicted = calibration.predicted[calibration.ks.index(k)]
    return (
        f"attention is Block-Sparse FlashAttention with k = {k} of {path} (density {predicted:.2f} predicted at "
        f"{calibration.length} tokens, {density:.2f} measured over all contexts); its profile below is that of dense "
        "attention."
    )


def choose_autocast(precision: str, subject: Subject, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast: as asked, or for "auto" bfloat16 on CUDA where the run's trainer.precision is bf16."""
    if precision == "auto":
        trainer = provenance.run_settings(subject.checkpoint.path).get("trainer") or {}
        trained = str(trainer.get("precision", ""))
        precision = "bfloat16" if device.type == "cuda" and trained.startswith("bf16") else "float32"
    return torch.bfloat16 if precision == "bfloat16" else None


def _timed(seconds: dict[str, float], name: str, work: Callable[[], T]) -> T:
    started = time.monotonic()
    result = work()
    seconds[name] = round(time.monotonic() - started, 2)
    return result


def _settings(subject: Subject) -> dict[str, str]:
    settings = provenance.run_settings(subject.checkpoint.path)
    # Without its run folder a checkpoint still records its model.
    return provenance.flatten(settings or {"model": {"network": subject.checkpoint.meta["model"]}})


def _metrics(subject: Subject) -> dict[str, Series]:
    return read_metrics(subject.run_dir)


if __name__ == "__main__":
    sys.exit(main())
