"""The file of BSFA's calibrated thresholds: one tensor, and what it was calibrated on."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from common.dataclasses_json import to_dataclass
from common.files import write_file
from kernels import KEY_BLOCK, QUERY_BLOCK
from model.checksums import tensor_checksum

FORMAT = 3  # 2 had no checksum
WAY_OUT = "calibrate again with python -m eval.calibrate"
Estimator = Literal["mean", "pooled"]  # of ThresholdCollector


@dataclass(frozen=True)
class Calibration:
    """What stands beside the thresholds in their file.

    model: fingerprint of the model they belong to (model.loading.model_fingerprint). checkpoint, step: where it was.
    ks: off-diagonal blocks that each set of thresholds keeps. length, samples: of the texts. estimator: how their
    thresholds became one. predicted: density of each k at that length. measured: on held-out text, mean over layers and
    heads; None where that has no such length.
    """

    model: str
    checkpoint: str
    step: int
    ks: list[int]
    length: int
    samples: int
    estimator: Estimator
    predicted: list[float]
    measured: list[float] | None
    query_block: int = QUERY_BLOCK
    key_block: int = KEY_BLOCK
    format: int = FORMAT


def save_thresholds(path: Path, thresholds: Tensor, calibration: Calibration) -> None:
    """thresholds: float32 (ks, L, H, P)."""
    text = json.dumps(asdict(calibration))
    metadata = {"calibration": text, "checksum": _checksum(thresholds, text)}
    write_file(path, save({"thresholds": thresholds.contiguous()}, metadata))


def _checksum(thresholds: Tensor, calibration: str) -> str:
    """Of both, as they stand in the file."""
    return xxhash.xxh3_64(f"{tensor_checksum(thresholds)} {calibration}".encode()).hexdigest()


def read_thresholds(path: Path) -> tuple[Tensor, Calibration]:
    """Raises FileNotFoundError, or ValueError for a file that is damaged or that save_thresholds did not write."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; calibrate the checkpoint first: python -m eval.calibrate ...")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            content = json.loads(metadata["calibration"])
            thresholds = file.get_tensor("thresholds")
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds no thresholds of eval.calibrate ({error}): {WAY_OUT}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no thresholds of eval.calibrate (its calibration is no object): {WAY_OUT}")
    grid = (content.get("format"), content.get("query_block"), content.get("key_block"))
    if grid != (FORMAT, QUERY_BLOCK, KEY_BLOCK):
        raise ValueError(f"{path} has format and blocks {grid}, expected {(FORMAT, QUERY_BLOCK, KEY_BLOCK)}: {WAY_OUT}")
    found, wanted = _checksum(thresholds, metadata["calibration"]), metadata.get("checksum")
    if found != wanted:
        raise ValueError(f"{path} is damaged: it has checksum {found}, expected {wanted}: {WAY_OUT}")
    calibration = to_dataclass(content, Calibration, str(path), WAY_OUT)
    if thresholds.ndim != 4 or len(thresholds) != len(calibration.ks) or bool(thresholds.isnan().any()):
        raise ValueError(
            f"{path} has thresholds of shape {tuple(thresholds.shape)} for {len(calibration.ks)} ks, expected (ks, "
            f"layers, heads, positions) without NaN: {WAY_OUT}"
        )
    return thresholds, calibration
