"""Models from checkpoints and exported folders, verified, without executing pickled code."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from model.checkpoint import CHECKSUM, WEIGHT, CheckpointInfo, check_marker, readable, resolve_checkpoint, way_out
from model.checksums import Verify, file_checksum, is_finite, tensor_checksum
from model.config import TRAINED_SPARSE, ModelConfig
from model.transformer import Transformer

FINGERPRINT_VALUES = 4096
# Defaults of what architectures had no key for at first: fingerprints of older models stay what they are
ADDED: dict[str, Any] = {"rope_scaling": None, "nope_layers": [], "qkv_bias": False}


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


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint by key, on the CPU, mapped into memory: only what is used is read.

    Raises ValueError when a file is damaged, Unreadable when the system refuses to read it.
    """

    def __init__(self, checkpoint: CheckpointInfo) -> None:
        self.folder, self.files = checkpoint.path, dict(checkpoint.meta["tensors"])
        self.checksums: dict[str, str] = checkpoint.meta.get("checksums", {})  # none before there were any
        self._open: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Tensor:
        name = self.files[key]
        with readable(self.folder / name):
            if name not in self._open:
                self._open[name] = safe_open(self.folder / name, framework="pt")
            return self._open[name].get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors, from the files' headers."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name in dict.fromkeys(self.files.values()):
            with readable(self.folder / name), safe_open(self.folder / name, framework="pt") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        for key, name in self.files.items():
            if key not in shapes:
                raise ValueError(f"{self.folder / name} has no tensor {key}: {way_out(self.folder)}")
        return shapes

    def check(self, key: str, tensor: Tensor | None = None) -> None:
        """Raises ValueError when a tensor (which may be at hand already) has not the bytes that were written."""
        if key not in self.checksums:
            return
        found, wanted = tensor_checksum(self[key] if tensor is None else tensor), self.checksums[key]
        if found != wanted:
            raise ValueError(
                f"{self.folder / self.files[key]} is damaged: {key} has checksum {found}, expected {wanted}; "
                f"{way_out(self.folder)}"
            )


def check_file(checkpoint: CheckpointInfo, name: str) -> None:
    """Raises ValueError when a file without tensors has not the bytes that were written, Unreadable when the system
    refuses to read it."""
    where, wanted = checkpoint.path / name, checkpoint.meta["files"][name].get(CHECKSUM)
    if wanted is None:
        return
    with readable(where):
        found = file_checksum(where)
    if found != wanted:
        raise ValueError(f"{where} is damaged: it has checksum {found}, expected {wanted}; {way_out(checkpoint.path)}")


def stored_weights(checkpoint: CheckpointInfo, verify: Verify = "checksum") -> dict[str, Tensor]:
    """Weights by parameter name, mapped into memory; float32 in a checkpoint.

    Raises ValueError that names file and tensor: where one has not the bytes that were written, unless verify is
    "size", or holds numbers that are not finite.
    """
    if verify == "checksum":
        check_marker(checkpoint)
    stored, weights = StoredTensors(checkpoint), {}
    for key in stored:
        if not key.startswith(WEIGHT) and "/" in key:
            continue  # an exported model has weights only, by their plain names
        weights[key.removeprefix(WEIGHT)] = tensor = stored[key]
        if verify == "checksum":
            stored.check(key, tensor)
        if not is_finite(tensor):
            raise ValueError(f"{stored.folder / stored.files[key]}: {key} is not finite; choose another checkpoint")
    return weights


def model_fingerprint(model: Transformer) -> str:
    """Identity of a model, wherever it lies: sha256 over its architecture and the first FINGERPRINT_VALUES values of
    each parameter, which every optimizer step and every change of dtype moves."""
    architecture = {name: value for name, value in asdict(model.config).items() if ADDED.get(name, ...) != value}
    for kind in TRAINED_SPARSE:  # as for those in ADDED
        if architecture["attention"][kind] is None:
            del architecture["attention"][kind]
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    for name, weight in sorted(model.named_parameters()):
        part = weight.detach().flatten()[:FINGERPRINT_VALUES].contiguous().view(torch.uint8)
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode() + part.cpu().numpy().tobytes())
    return digest.hexdigest()


def load_model(path: str | Path, device: str | torch.device = "cpu", verify: Verify = "checksum") -> LoadedModel:
    """The model of a checkpoint or of a folder written by model.export, in eval mode, weights as saved.

    Args:
        path: as in `resolve_checkpoint`.
        verify: "checksum" reads all weights and compares them with what was written (model/checksums.py says what that
            costs); "size" compares sizes of files only.

    Raises:
        FileNotFoundError, ValueError: as `resolve_checkpoint` and `stored_weights`, or the weights do not fit the
            recorded architecture.
    """
    found = resolve_checkpoint(path)
    config, tokenizer = found.architecture, found.tokenizer
    training_length: int = found.require(sequence_length=int)["sequence_length"]
    weights = stored_weights(found, verify)
    with torch.device("meta"):
        model = Transformer(config)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{found.path}: weights do not fit the recorded model: {error}; {way_out(found.path)}"
        ) from error
    model.set_step(found.step)  # in the middle of annealing, alpha is what it was then
    return LoadedModel(
        model=model.to(device).eval(),
        config=config,
        step=found.step,
        training_length=training_length,
        tokenizer_path=tokenizer["path"],
        tokenizer_fingerprint=tokenizer["fingerprint"],
        path=found.path,
    )
