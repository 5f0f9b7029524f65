"""Which checkpoints are evaluated, on which device, in which precision."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data.store import TokenStore
from eval.common import provenance
from model.checkpoint import CheckpointInfo, resolve_checkpoint
from model.policies.dual_chunk import DualChunk


@dataclass(frozen=True)
class Subject:
    """One checkpoint to evaluate, with the label it has in the report. dual_chunk: the trained length from which it
    attends by Dual Chunk Attention; None for the model's own attention."""

    label: str
    checkpoint: CheckpointInfo
    dual_chunk: int | None = None

    @property
    def run_dir(self) -> Path:
        return self.checkpoint.path.resolve().parent.parent


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
        raise ValueError(f"device is {name!r}, but torch finds {found} CUDA devices: use cpu")
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
    _check_labels(labels)
    return [Subject(label, checkpoint) for label, checkpoint in zip(labels, found, strict=True)]


def with_dual_chunk(subjects: Sequence[Subject], trained_length: int | None) -> list[Subject]:
    """Behind each rotary softmax model itself with Dual Chunk Attention; `subjects` alone where trained_length is None.

    Raises: ValueError where no model can have it.
    """
    if trained_length is None:
        return list(subjects)
    found: list[Subject] = []
    refused: list[str] = []
    for subject in subjects:
        found.append(subject)
        model = subject.checkpoint.architecture
        try:
            if not model.attention.is_softmax:
                raise ValueError(f"attention.kind is {model.attention.kind!r}: dual_chunk is for softmax")
            DualChunk.of_trained_length(trained_length).check(model)
        except ValueError as error:
            refused.append(f"{subject.label}: {error}")
        else:
            found.append(Subject(f"{subject.label}-dual-chunk", subject.checkpoint, trained_length))
    if len(found) == len(subjects):
        raise ValueError(f"dual_chunk is {trained_length}, and no run can attend so: {'; '.join(refused)}")
    _check_labels([subject.label for subject in found])
    return found


def _check_labels(labels: Sequence[str]) -> None:
    if len(set(labels)) < len(labels):
        raise ValueError(f"the runs have the labels {', '.join(labels)}: rename their folders so that they differ")


def check_tokenizer(subject: Subject, data: Path, store: TokenStore) -> None:
    """Raises ValueError where a split was prepared with another tokenizer than the checkpoint's."""
    tokenizer = subject.checkpoint.tokenizer
    if tokenizer["fingerprint"] != store.fingerprint_of_tokenizer:
        raise ValueError(
            f"{subject.checkpoint.path} was trained with tokenizer {tokenizer['fingerprint'][:12]} "
            f"({tokenizer['path']}), but {data} was prepared with {store.fingerprint_of_tokenizer[:12]}: pass the "
            "--data folder that the run was trained on, or prepare one with its tokenizer (tokenizer.path)"
        )


def file_fingerprint(path: Path) -> str:
    """sha256. Raises FileNotFoundError."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def choose_autocast(precision: str, subject: Subject, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast: as asked, or for "auto" bfloat16 on CUDA where the run's trainer.precision is bf16."""
    if precision == "auto":
        trainer = provenance.run_settings(subject.checkpoint.path).get("trainer") or {}
        trained = str(trainer.get("precision", ""))
        precision = "bfloat16" if device.type == "cuda" and trained.startswith("bf16") else "float32"
    return torch.bfloat16 if precision == "bfloat16" else None
