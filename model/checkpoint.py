"""Checkpoints on disk: complete or absent, found by their marker, loaded without executing pickled code.

RUN/checkpoints/step-00000010/ holds
    state-00000.safetensors, ...  whole float32 tensors, each in one file: weight/NAME, exp_avg/NAME, exp_avg_sq/NAME
    trainer.ckpt                  Lightning's loops and schedules, the data's position, AdamW's step counters
    complete.json                 what was trained, the size of each file, the file of each tensor; written last
Nothing in it depends on the number of processes that wrote it, nor on how they divided the state.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.files import flush
from model.config import ModelConfig, config_from_dict
from model.transformer import Transformer

MARKER = "complete.json"
TRAINER_STATE = "trainer.ckpt"
STATE_FILE = "state-{:05d}.safetensors"
EXPORT_CONFIG = "config.json"
FORMAT = 2
WEIGHT = "weight/"
FINGERPRINT_VALUES = 4096


@dataclass(frozen=True)
class CheckpointInfo:
    """A complete checkpoint, or a model written by model.export. meta: the content of complete.json or config.json."""

    path: Path
    step: int
    meta: dict[str, Any]


@dataclass(frozen=True)
class LoadedModel:
    """training_length: tokens per training sequence. tokenizer_path may be gone: the fingerprint decides."""

    model: Transformer
    config: ModelConfig
    step: int
    training_length: int
    tokenizer_path: str
    tokenizer_fingerprint: str
    path: Path


def checkpoint_folder(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / "checkpoints" / f"step-{step:08d}"


def write_complete(folder: str | Path, meta: dict[str, Any], marker: str = MARKER) -> None:
    """Makes a finished checkpoint folder a complete one: every file is flushed to disk, then the marker appears in
    one rename.

    meta: JSON-able; "format", "files" (sizes in bytes of all files in the folder) and "tensors" (the file of each
        tensor) are added. Raises OSError if the disk refuses.
    """
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for path in (*files, *{p.parent for p in files}):
        flush(path)
    sizes = {str(p.relative_to(folder)): {"bytes": p.stat().st_size} for p in files}
    tensors: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= dict.fromkeys(file.keys(), path.name)
    pending = folder / f"{marker}.partial"
    pending.write_text(json.dumps({"format": FORMAT, **meta, "files": sizes, "tensors": tensors}, indent=2))
    flush(pending)
    pending.rename(folder / marker)
    flush(folder)
    flush(folder.parent)


def share(path: Path) -> None:
    """Give a file the permissions that its folder has: safetensors lets nobody but the owner read what it writes."""
    path.chmod(path.parent.stat().st_mode & 0o666)


def read_complete(folder: str | Path) -> CheckpointInfo:
    """The checkpoint or exported model in a folder. Raises ValueError that says why it is not a complete one."""
    folder = Path(folder)
    marker = folder / (EXPORT_CONFIG if (folder / EXPORT_CONFIG).is_file() else MARKER)
    if not marker.is_file():
        raise ValueError(f"{folder} is no complete checkpoint: it has no {MARKER} (its save was interrupted)")
    try:
        meta = json.loads(marker.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{marker} is not valid JSON ({error}): choose another checkpoint") from error
    if meta.get("format") != FORMAT:
        raise ValueError(
            f"{marker} has format {meta.get('format')!r}, expected {FORMAT}: written by another version of this code"
        )
    for name, entry in meta["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise ValueError(f"{path} {found}, expected {entry['bytes']} bytes: choose another checkpoint")
    return CheckpointInfo(folder, int(meta["step"]), meta)


def find_checkpoints(run_dir: str | Path) -> tuple[list[CheckpointInfo], list[str]]:
    """Complete checkpoints of a run folder, oldest first, and a line on what each incomplete one lacks."""
    complete, incomplete = [], []
    for folder in sorted((Path(run_dir) / "checkpoints").glob("step-*")):
        try:
            complete.append(read_complete(folder))
        except ValueError as error:
            incomplete.append(str(error))
    return sorted(complete, key=lambda c: c.step), incomplete


def resolve_checkpoint(path: str | Path) -> CheckpointInfo:
    """path: a checkpoint folder, a run folder (its newest complete checkpoint), or a folder written by model.export.
    Raises FileNotFoundError or ValueError."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; expected a run folder or one of its checkpoints/step-*")
    if path.name.startswith("step-") or any((path / name).is_file() for name in (MARKER, EXPORT_CONFIG)):
        return read_complete(path)
    complete, incomplete = find_checkpoints(path)
    if not complete:
        raise FileNotFoundError(f"{path} holds no complete checkpoint" + "".join(f"; {line}" for line in incomplete))
    return complete[-1]


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint by key, on the CPU, mapped into memory: only what is used is read.

    Raises ValueError when a file is damaged.
    """

    def __init__(self, checkpoint: CheckpointInfo) -> None:
        self.folder, self.files = checkpoint.path, dict(checkpoint.meta["tensors"])
        self._open: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Tensor:
        name = self.files[key]
        try:
            if name not in self._open:
                self._open[name] = safe_open(self.folder / name, framework="pt")
            return self._open[name].get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.folder / name} cannot be read ({error}): choose another checkpoint") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def stored_weights(checkpoint: CheckpointInfo) -> dict[str, Tensor]:
    """Weights by parameter name, mapped into memory; float32 in a checkpoint."""
    stored = StoredTensors(checkpoint)
    # an exported model has weights only, by their plain names
    return {key.removeprefix(WEIGHT): stored[key] for key in stored if key.startswith(WEIGHT) or "/" not in key}


def model_fingerprint(model: Transformer) -> str:
    """Identity of a model, wherever it lies: sha256 over its architecture and the first FINGERPRINT_VALUES values of
    each parameter, which every optimizer step and every change of dtype moves."""
    digest = hashlib.sha256(json.dumps(asdict(model.config), sort_keys=True).encode())
    for name, weight in sorted(model.named_parameters()):
        part = weight.detach().flatten()[:FINGERPRINT_VALUES].contiguous().view(torch.uint8)
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode() + part.cpu().numpy().tobytes())
    return digest.hexdigest()


def load_model(path: str | Path, device: str | torch.device = "cpu") -> LoadedModel:
    """The model of a checkpoint or of a folder written by model.export, in eval mode, weights as saved.

    path: as in `resolve_checkpoint`. Raises ValueError when the weights do not fit the recorded architecture.
    """
    found = resolve_checkpoint(path)
    config = config_from_dict(found.meta["model"])
    weights = stored_weights(found)
    with torch.device("meta"):
        model = Transformer(config)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{found.path}: weights do not fit the recorded model: {error}") from error
    model.set_step(found.step)  # in the middle of annealing, alpha is what it was then
    tokenizer = found.meta["tokenizer"]
    return LoadedModel(
        model=model.to(device).eval(),
        config=config,
        step=found.step,
        training_length=int(found.meta["sequence_length"]),
        tokenizer_path=tokenizer["path"],
        tokenizer_fingerprint=tokenizer["fingerprint"],
        path=found.path,
    )
