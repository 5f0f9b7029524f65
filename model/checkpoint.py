"""Checkpoints on disk: complete or absent, found by their marker, loaded without executing pickled code.

RUN/checkpoints/step-00000010/ holds
    state-00000.safetensors, ...  whole float32 tensors, each in one file: weight/NAME, exp_avg/NAME, exp_avg_sq/NAME,
                                  or momentum_buffer/NAME of what Muon trains
    trainer.ckpt                  Lightning's loops and schedules, the data's position, AdamW's step counters
    complete.json                 what was trained, sizes of files, the file and checksum of each tensor; written last
Nothing in it depends on the number of processes that wrote it, nor on how they divided the state.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from common.files import check_keys, flush, read_json, write_json
from model.checksums import content_checksum, file_checksum, tensor_checksum
from model.config import ModelConfig, config_from_dict

MARKER = "complete.json"
TRAINER_STATE = "trainer.ckpt"
STATE_FILE = "state-{:05d}.safetensors"
EXPORT_CONFIG = "config.json"
TOKENIZER_FOLDER = "tokenizer"  # of a converted run
NETWORK = "network.yaml"  # likewise: its architecture, for --config of train.py
RUN_FILES = ("config.yaml", NETWORK)  # of a trained run, of a converted one
FORMAT = 2
WEIGHT = "weight/"
CHECKSUM = "xxh3_64"
NAME = re.compile(r"step-(\d{8,})")
WAY_OUT = "choose another checkpoint (once this one is moved away, its run stands for the one before)"
EXPORT_AGAIN = "choose another model, or export this one again with python -m model.export"


class InterruptedSave(ValueError):
    """A folder without marker: a checkpoint that never was complete, or whose removal was interrupted."""


class DamagedCheckpoint(ValueError):
    """It has been complete, and is not what it was."""


class Unreadable(OSError):
    """The system refuses to read a file of it, which may be whole."""


class UnknownFormat(ValueError):
    """Its marker is that of another version of this code."""


@dataclass(frozen=True)
class CheckpointInfo:
    """A complete checkpoint, or a model written by model.export. meta: the content of complete.json or config.json."""

    path: Path
    step: int
    meta: dict[str, Any]

    def require(self, **kinds: type | tuple[type, ...]) -> dict[str, Any]:
        """meta, if it has these keys with values of these types. Raises ValueError that names marker and key."""
        return check_keys(self.meta, kinds, str(_marker(self.path)), way_out(self.path))

    @property
    def belongings(self) -> Path:
        """The run's folder, if it is one (copied checkpoints may lie anywhere); else that of the checkpoints, or this
        one's where it lies by itself."""
        folder = self.path.resolve()
        if folder.parent.name != "checkpoints":
            return folder
        run = folder.parents[1]
        return run if any((run / name).exists() for name in RUN_FILES) else folder.parent

    @property
    def tokenizer(self) -> dict[str, Any]:
        """ "path" and "fingerprint" of the tokenizer that it was trained with; the path is that of the run's own copy,
        where a converted run has one. Raises ValueError as `require`."""
        where = f"tokenizer in {_marker(self.path)}"
        kinds = {"path": str, "fingerprint": str}
        said = check_keys(self.require(tokenizer=dict)["tokenizer"], kinds, where, way_out(self.path))
        copy = self.path.parent.parent / TOKENIZER_FOLDER / Path(said["path"]).name
        in_run = self.path.parent.name == "checkpoints"
        return {**said, "path": str(copy)} if in_run and copy.is_file() else said

    @property
    def architecture(self) -> ModelConfig:
        """Raises ValueError when it is none of this version."""
        try:
            return config_from_dict(self.require(model=dict)["model"])
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"model in {_marker(self.path)} is no architecture ({error}); {way_out(self.path)}"
            ) from error


def checkpoint_folder(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / "checkpoints" / f"step-{step:08d}"


def named_step(folder: Path) -> int | None:
    """The step in the name of a folder, if this code gives such names: a copy named step-00000010-best has none."""
    match = NAME.fullmatch(folder.name)
    return int(match[1]) if match and checkpoint_folder("", int(match[1])).name == folder.name else None


def write_complete(
    folder: str | Path, meta: dict[str, Any], marker: str = MARKER, checksums: Mapping[str, str] | None = None
) -> None:
    """Makes a finished checkpoint folder a complete one: every file is flushed to disk, then the marker appears in
    one rename.

    Args:
        meta: JSON-able; "format", "files" (size in bytes of each file in the folder; with its checksum where it holds
            no tensors), "tensors" (the file of each tensor), "checksums" (of each tensor) and "checksum" (of all this)
            are added.
        checksums: of tensors by key, taken while they were in memory; others are read again.

    Raises:
        OSError: the disk refuses.
    """
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for path in (*files, *{p.parent for p in files}):
        flush(path)
    entries: dict[str, dict[str, Any]] = {str(p.relative_to(folder)): {"bytes": p.stat().st_size} for p in files}
    tensors: dict[str, str] = {}
    sums = dict(checksums or {})
    for path in files:
        if path.suffix != ".safetensors":
            entries[str(path.relative_to(folder))][CHECKSUM] = file_checksum(path)
            continue
        with safe_open(path, framework="pt") as file:
            tensors |= dict.fromkeys(file.keys(), path.name)
            sums |= {key: tensor_checksum(file.get_tensor(key)) for key in file.keys() if key not in sums}  # noqa: SIM118
    content = {**meta, "files": entries, "tensors": tensors, "checksums": {key: sums[key] for key in tensors}}
    content = json.loads(json.dumps({"format": FORMAT, **content}))  # as it will be read
    write_json(folder / marker, {**content, "checksum": content_checksum(content)}, indent=2)
    flush(folder.parent)


def move_aside(folder: Path, why: str) -> Path:
    """Give a checkpoint folder a name that no run takes for its own, as step-00000010.damaged-1; returns that."""
    names = (folder.with_name(f"{folder.name}.{why}-{number}") for number in itertools.count(1))
    aside = next(path for path in names if not path.exists())
    return folder.rename(aside)


def share(path: Path) -> None:
    """Give a file the permissions that its folder has: safetensors lets nobody but the owner read what it writes."""
    path.chmod(path.parent.stat().st_mode & 0o666)


def read_complete(folder: str | Path) -> CheckpointInfo:
    """The checkpoint or exported model in a folder; only sizes of its files are looked at.

    Raises:
        InterruptedSave, UnknownFormat, DamagedCheckpoint: all ValueErrors, that say why it is not a complete one.
    """
    folder = Path(folder)
    marker = _marker(folder)
    if not marker.is_file():
        raise InterruptedSave(f"{folder} is no complete checkpoint: it has no {MARKER} (its save was interrupted)")
    try:
        meta = read_json(marker, way_out(folder))
        if "format" not in meta and "model_type" in meta:
            raise UnknownFormat(
                f"{folder} is a model of transformers: expected a run or an export of this code; "
                "python -m model.hub.convert makes a run of it"
            )
        if meta.get("format") != FORMAT:
            raise UnknownFormat(
                f"{marker} has format {meta.get('format')!r}, expected {FORMAT}: written by another version of this "
                "code, which can use it"
            )
        return _checked(CheckpointInfo(folder, meta.get("step", 0), meta))
    except UnknownFormat:
        raise
    except ValueError as error:
        raise DamagedCheckpoint(str(error)) from error


def _marker(folder: Path) -> Path:
    return folder / (EXPORT_CONFIG if (folder / EXPORT_CONFIG).is_file() else MARKER)


def way_out(folder: Path) -> str:
    """What to do when something in a folder is damaged; ends the message."""
    return EXPORT_AGAIN if (folder / EXPORT_CONFIG).is_file() else WAY_OUT


def check_marker(found: CheckpointInfo) -> None:
    """Raises ValueError where the marker has not the content that was written."""
    wanted = found.meta.get("checksum")  # none before there were any
    if wanted is not None and (checksum := content_checksum(found.meta)) != wanted:
        raise ValueError(
            f"{_marker(found.path)} is damaged: its content has checksum {checksum}, expected {wanted} (after a change "
            f'by hand, remove "checksum" there); {way_out(found.path)}'
        )


def _checked(found: CheckpointInfo) -> CheckpointInfo:
    """Raises ValueError where the marker lacks something, or the folder does not have what the marker says."""
    meta, way = found.require(step=int, files=dict, tensors=dict), way_out(found.path)
    for name, entry in meta["files"].items():
        path = found.path / name
        wanted = check_keys(entry, {"bytes": int}, f"files, {name} in {_marker(found.path)}", way)["bytes"]
        size = path.stat().st_size if path.is_file() else None
        if size != wanted:
            what = "is missing" if size is None else f"has {size} bytes"
            raise ValueError(f"{path} {what}, expected {wanted} bytes: {way}")
    for key, name in meta["tensors"].items():
        if not isinstance(name, str) or name not in meta["files"]:
            raise ValueError(f"tensors, {key} in {_marker(found.path)} is {name!r}, expected one of files; {way}")
    if "checksums" in meta:
        found.require(checksums=dict)
    return found


@dataclass(frozen=True)
class RunCheckpoints:
    """What lies in a run's checkpoints folder under names that this code gives; other names are the user's own.

    complete: oldest first. others: in the order of their steps, why each of them is not complete.
    """

    complete: list[CheckpointInfo]
    others: dict[Path, ValueError]

    @property
    def newest(self) -> CheckpointInfo | None:
        return self.complete[-1] if self.complete else None

    @property
    def lost(self) -> list[ValueError]:
        """What is wrong with those that were complete once and are newer than the newest complete one."""
        last = self.newest.step if self.newest else -1
        return [
            error
            for folder, error in self.others.items()
            if not isinstance(error, InterruptedSave) and (named_step(folder) or 0) > last
        ]


def list_checkpoints(run_dir: str | Path) -> RunCheckpoints:
    complete, others = [], {}
    folders = [path for path in (Path(run_dir) / "checkpoints").glob("step-*") if named_step(path) is not None]
    for folder in sorted(folders, key=lambda path: named_step(path) or 0):
        if not folder.is_dir():
            continue
        try:
            complete.append(read_complete(folder))
        except ValueError as error:
            others[folder] = error
    return RunCheckpoints(sorted(complete, key=lambda found: found.step), others)


def find_checkpoints(run_dir: str | Path) -> tuple[list[CheckpointInfo], list[str]]:
    """Complete checkpoints of a run folder, oldest first, and a line on what each of the others lacks."""
    found = list_checkpoints(run_dir)
    return found.complete, [str(error) for error in found.others.values()]


def resolve_checkpoint(path: str | Path) -> CheckpointInfo:
    """path: a checkpoint folder, a run folder (its newest complete checkpoint), or a folder written by model.export.

    Raises FileNotFoundError or ValueError, also where a run's newest checkpoint is damaged or of another format: an
    older one is taken by its own path only.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; expected a run folder or one of its checkpoints/step-*")
    of_checkpoint = named_step(path) is not None and not (path / "checkpoints").is_dir()
    if of_checkpoint or any((path / name).is_file() for name in (MARKER, EXPORT_CONFIG)):
        return read_complete(path)
    found = list_checkpoints(path)
    if found.newest is None:
        lines = "".join(f"; {line}" for line in found.others.values())
        runs = sorted(folder.parent.name for folder in path.glob("*/checkpoints"))
        several = f", but runs, of which one is expected: {', '.join(runs[:5])}" if runs else ""
        raise FileNotFoundError(f"{path} holds no complete checkpoint{several}{lines}")
    if found.lost:
        raise ValueError(f"{path}: {found.lost[-1]}; the newest complete one is {found.newest.path}")
    return found.newest


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Around reading a file: raises ValueError where its content is not what it should be or it is gone, Unreadable
    where the system refuses."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}): {way_out(path.parent)}") from error
    except OSError as error:
        reason = error.strerror or str(error)
        if isinstance(error, FileNotFoundError):  # safetensors says so of every file that it cannot open
            try:
                open(path, "rb").close()
            except FileNotFoundError:
                raise ValueError(f"{path} is missing: {way_out(path.parent)}") from error
            except OSError as refused:
                reason = refused.strerror or str(refused)
        raise Unreadable(
            f"{path} cannot be read ({reason}), and may be whole: look at the disk or the permissions, then "
            "run the same command again"
        ) from error
