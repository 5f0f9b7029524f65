"""Checkpoint folders without a model, and the policy that removes old ones."""

from pathlib import Path

from model.checkpoint import (
    TRAINER_STATE,
    checkpoint_folder,
    write_complete,
)
from training.callbacks.checkpointing import CheckpointConfig, RunCheckpoint
from training.faults.progress import Progress
from training.resume.start_point import StartPoint
from training.throughput import StepClock


def make_checkpoint(run_dir: Path, step: int, complete: bool = True) -> Path:
    """A folder with what choosing looks at; returns its path."""
    folder = checkpoint_folder(run_dir, step)
    folder.mkdir(parents=True)
    (folder / TRAINER_STATE).write_bytes(b"0123456789")
    if complete:
        write_complete(folder, {"step": step, "samples": 4 * step, "tokens": 64 * step})
    return folder


def remove_old(run_dir: Path) -> None:
    """Apply the policy that keeps the last two."""
    RunCheckpoint(run_dir, CheckpointConfig(keep_last=2), StartPoint(), "v", StepClock(), Progress()).remove_old()
