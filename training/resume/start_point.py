"""Choosing the checkpoint to resume from, and what a run that resumes may change."""

import pickle
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from common.errors import error_line
from common.exits import INTERRUPTED
from common.files import check_keys, naming
from common.nested import flatten
from model.checkpoint import (
    TRAINER_STATE,
    WAY_OUT,
    CheckpointInfo,
    RunCheckpoints,
    UnknownFormat,
    check_marker,
    list_checkpoints,
    move_aside,
    resolve_checkpoint,
)
from model.checksums import Verify
from model.config import ModelConfig
from model.loading import StoredTensors, check_file
from model.transfer import keeps_weights
from training.distributed.checkpoint_state import check_stored
from training.tracking import is_first_process, say

# Keys of the model config that choose how to compute, not what: they may differ between sessions.
EXECUTION_KEYS = {"attention.backend"}


@dataclass(frozen=True)
class StartPoint:
    """What a session starts from: 0 everywhere for a new run.

    Attributes:
        checkpoint: that it continues.
        by_auto: found by --resume auto, so that the one before will do where this one is damaged.
        verified: its tensors have been compared with what was written.
    """

    checkpoint: CheckpointInfo | None = None
    by_auto: bool = False
    verified: bool = False

    @property
    def step(self) -> int:
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def samples(self) -> int:
        return self.checkpoint.meta["samples"] if self.checkpoint else 0

    def samples_at(self, step: int, global_batch_size: int) -> int:
        """Global samples consumed by the optimizer steps up to `step` of this session, whatever the loader has
        fetched."""
        return self.samples + (step - self.step) * global_batch_size

    @property
    def tokens(self) -> int:
        return self.checkpoint.meta["tokens"] if self.checkpoint else 0

    @property
    def trainer_state(self) -> Path | None:
        return self.checkpoint.path / TRAINER_STATE if self.checkpoint else None


def choose_start(run_dir: Path, resume: str, verify: Verify = "size", *, alone: bool = True) -> StartPoint:
    """The start that --resume asks for, announced in a line.

    Args:
        run_dir: folder of the run to be written.
        resume: "none" starts at step 0; "auto" takes the newest complete checkpoint of run_dir, or starts at step 0
            where there is none; anything else is the path of a checkpoint folder, or of a run folder (its newest
            complete one).
        verify: "checksum": "auto" passes over what has not the bytes that were written. It is set aside, which means
            renamed, once there is one that has.
        alone: this process is the whole run, and compares tensors too; several divide that among them (check_start).

    Raises:
        ValueError: the run would mix with checkpoints that are already in run_dir, all of run_dir's are damaged, its
            newest is of another format, or PATH is not complete.
        FileNotFoundError: PATH does not exist or holds no complete checkpoint.
        OSError: a file cannot be read, which says nothing about what it holds.
    """
    found = list_checkpoints(run_dir)
    newest, lost = found.newest, found.lost
    if resume == "none":
        if newest:
            raise ValueError(
                f"--run_dir {run_dir} already has checkpoints, the newest at step {newest.step}: "
                "continue it with --resume auto, or choose another --run_dir"
            )
        if lost:
            raise ValueError(f"--run_dir {run_dir} already has checkpoints: {lost[-1]}; choose another --run_dir")
        return StartPoint()
    if resume == "auto":
        return _newest_start(run_dir, found, verify, alone)
    chosen = resolve_checkpoint(resume)
    if not (chosen.path / TRAINER_STATE).is_file():
        raise ValueError(
            f"--resume {resume} is an exported model: it has weights only; resume from a checkpoint of its run"
        )
    if newest and newest.path.resolve() != chosen.path.resolve():
        raise ValueError(
            f"--resume {resume} is not the newest checkpoint of --run_dir {run_dir}, which is {newest.path.name}: "
            "use --resume auto, or branch off into another --run_dir"
        )
    if lost and newest is None:
        raise ValueError(f"--run_dir {run_dir} already has checkpoints: {lost[-1]}; choose another --run_dir")
    return _start_of(chosen)


def _newest_start(run_dir: Path, found: RunCheckpoints, verify: Verify, alone: bool) -> StartPoint:
    """What --resume auto takes of those found in run_dir. Arguments and errors as of choose_start."""
    newest, lost = found.newest, found.lost
    if lost and (newest is None or isinstance(lost[-1], UnknownFormat)):
        raise ValueError(
            f"--resume auto: {lost[-1]}; starting from {newest.path if newest else 'step 0'} instead takes "
            f"{f'--resume {newest.path}' if newest else 'another --run_dir'}"
        )
    for line in found.others.values():
        say(f"passing over: {line}")
    if newest is None:
        say(f"--resume auto: {run_dir} has no complete checkpoint, starting from step 0")
        return StartPoint()
    whole, damaged = _newest_whole(found.complete, verify, alone)
    if whole is None:
        raise ValueError(
            f"--resume auto: {damaged[0][1]}, and {run_dir} has no other complete checkpoint; "
            "starting from step 0 takes another --run_dir"
        )
    for folder, error in damaged:
        say(f"warning: {error}; {_set_aside(folder)}, and the run goes on from {whole.path.name}")
    return replace(_start_of(whole), by_auto=True, verified=alone and verify == "checksum")


def _newest_whole(
    complete: list[CheckpointInfo], verify: Verify, alone: bool
) -> tuple[CheckpointInfo | None, list[tuple[Path, str]]]:
    """The newest checkpoint that has the bytes that were written, and what is wrong with the folders behind it."""
    damaged: list[tuple[Path, str]] = []
    for checkpoint in reversed(complete):
        try:
            if verify == "checksum":
                for name in checkpoint.meta["files"]:
                    check_file(checkpoint, name)
                if alone:
                    check_stored(StoredTensors(checkpoint))
            return checkpoint, damaged
        except (ValueError, FileNotFoundError) as error:  # not found: another rank has set it aside meanwhile
            damaged.append((checkpoint.path, _without_way_out(error)))
    return None, damaged


def check_start(start: StartPoint, run_dir: Path) -> None:
    """Compare the tensors of the checkpoint that a session starts from with what was written; each rank reads its
    share.

    Raises:
        ValueError: on all ranks, when one is damaged.
        Unreadable: on all ranks, when one cannot be read; it stays where it is.
        SystemExit: instead, where --resume auto has found it and there is one before: it is set aside, and the same
            command goes on from that one. What the ranks have done since they chose is not undone in this process.
    """
    if start.checkpoint is None or start.verified:
        return
    try:
        check_stored(StoredTensors(start.checkpoint))
    except ValueError as error:
        before = [found for found in list_checkpoints(run_dir).complete if found.step < start.step]
        if not start.by_auto or not before:
            raise
        say(
            f"warning: {_without_way_out(error)}; {_set_aside(start.checkpoint.path)}: the same command with --resume "
            f"auto goes on from {before[-1].path.name} (exit code {INTERRUPTED})"
        )
        raise SystemExit(INTERRUPTED if is_first_process() else 0) from error


def _set_aside(folder: Path) -> str:
    """Rename a damaged checkpoint, from one process of the run, and say so: it is neither taken nor removed again."""
    if not is_first_process():
        return "it is set aside"
    return f"it stays as {move_aside(folder, 'damaged').name}"


def _without_way_out(error: Exception) -> str:
    return error_line(error).removesuffix(WAY_OUT).rstrip("; :")


def _start_of(checkpoint: CheckpointInfo) -> StartPoint:
    checkpoint.require(samples=int, tokens=int)
    if TRAINER_STATE not in checkpoint.meta["files"]:
        raise ValueError(f"{checkpoint.path} has no {TRAINER_STATE} among its files; {WAY_OUT}")
    say(f"resuming from {checkpoint.path} (step {checkpoint.step})")
    return StartPoint(checkpoint)


def check_architecture(checkpoint: CheckpointInfo, architecture: dict[str, Any]) -> None:
    """Raises ValueError that lists the keys in which the checkpoint's model differs from the config's."""
    saved, wanted = flatten(checkpoint.require(model=dict)["model"]), flatten(architecture)
    keys = sorted((saved.keys() | wanted.keys()) - EXECUTION_KEYS)
    # a key that is newer than the checkpoint had its default then
    saved = {**flatten(asdict(ModelConfig())), **saved}
    differing = [key for key in keys if saved.get(key) != wanted.get(key)]
    if differing:
        listed = ", ".join(f"{key} {saved.get(key)!r} (config: {wanted.get(key)!r})" for key in differing)
        if all(keeps_weights(key) for key in differing):  # as from one stage of training to the next
            raise ValueError(
                f"{checkpoint.path} was trained with model.network.{listed}, and a run that resumes keeps to that; the "
                f"weights fit: start a new run from them, --init_from {checkpoint.path} with another --run_dir, or use "
                "the config it was trained with"
            )
        raise ValueError(
            f"{checkpoint.path} is a checkpoint of another architecture: model.network has {listed}; "
            "use the config it was trained with, or another --run_dir, with --init_from for a new run from its weights"
        )


def check_tokenizer(
    checkpoint: CheckpointInfo, path: str, fingerprint: str, instead: str = "another --run_dir"
) -> None:
    """Raises ValueError if the checkpoint was trained with another tokenizer than that of the data. instead: what else
    to give."""
    saved = checkpoint.tokenizer
    if saved["fingerprint"] != fingerprint:
        raise ValueError(
            f"{checkpoint.path} was trained with tokenizer {saved['path']} ({saved['fingerprint'][:12]}), the data has "
            f"{path} ({fingerprint[:12]}): use the data it was trained on, or {instead}"
        )


def read_data_state(checkpoint: CheckpointInfo, name: str, verify: Verify = "checksum") -> dict[str, Any]:
    """State of the data module of class `name` in a checkpoint.

    Raises ValueError that names the file when it is damaged or lacks what a run needs.
    """
    path = checkpoint.path / TRAINER_STATE
    if verify == "checksum":
        check_marker(checkpoint)
        check_file(checkpoint, TRAINER_STATE)
    try:
        with naming(path):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0]}); {WAY_OUT}") from error
    kinds = {name: dict, "global_step": int, "loops": dict, "lr_schedulers": list, "optimizer_steps": dict}
    return check_keys(content, kinds, str(path), WAY_OUT)[name]


def warn_of_unknown_data(checkpoint: CheckpointInfo, data_state: dict[str, Any]) -> None:
    """Say so where a checkpoint does not know its data's identity."""
    sources = data_state["order"].get("sources", [])
    if any("content" not in source for source in sources):
        say(
            f"warning: {checkpoint.path} is older than the record of its shards: if data.sources were prepared again, "
            "that goes unnoticed"
        )
