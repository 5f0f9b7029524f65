"""Files of what was calibrated for one model's sparse attention: tensors, what they were calibrated on, a checksum."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from common.dataclasses_json import to_dataclass
from common.files import write_file
from model.checksums import tensor_checksum

T = TypeVar("T")


def save_calibrated(path: Path, tensors: Mapping[str, Tensor], calibration: Any) -> None:
    """calibration: a dataclass."""
    text = json.dumps(asdict(calibration))
    metadata = {"calibration": text, "checksum": _checksum(tensors, text)}
    write_file(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))


def read_calibrated(
    path: Path, names: list[str], kind: type[T], grid: Mapping[str, object], command: str
) -> tuple[dict[str, Tensor], T]:
    """The tensors `names`, and what they were calibrated on.

    grid: fields of the calibration that have to have these values. command: that makes such files, for messages.

    Raises: FileNotFoundError, or ValueError for a file that is damaged or that `command` did not write.
    """
    what, again = names[0], f"make it again with python -m {command}"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; make it first: python -m {command} ...")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            content = json.loads(metadata["calibration"])
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds no {what} of {command} ({error}): {again}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no {what} of {command} (its calibration is no object): {again}")
    found, wanted = tuple(content.get(name) for name in grid), tuple(grid.values())
    if found != wanted:
        raise ValueError(f"{path} has {', '.join(grid)} {found}, expected {wanted}: {again}")
    checksum = _checksum(tensors, metadata["calibration"])
    if checksum != metadata.get("checksum"):
        raise ValueError(f"{path} is damaged: it has checksum {checksum}, expected {metadata.get('checksum')}: {again}")
    return tensors, to_dataclass(content, kind, str(path), again)


def _checksum(tensors: Mapping[str, Tensor], calibration: str) -> str:
    """Of all, as they stand in the file."""
    sums = " ".join(tensor_checksum(tensor) for tensor in tensors.values())
    return xxhash.xxh3_64(f"{sums} {calibration}".encode()).hexdigest()
