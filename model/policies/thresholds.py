"""The file of BSFA's calibrated thresholds: one tensor, and what it was calibrated on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from kernels import KEY_BLOCK, QUERY_BLOCK
from model.policies.calibrated_files import read_calibrated, save_calibrated

FORMAT = 3  # 2 had no checksum
COMMAND = "eval.calibrate"
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
    save_calibrated(path, {"thresholds": thresholds}, calibration)


def read_thresholds(path: Path) -> tuple[Tensor, Calibration]:
    """Raises FileNotFoundError, or ValueError for a file that is damaged or that save_thresholds did not write."""
    grid = {"format": FORMAT, "query_block": QUERY_BLOCK, "key_block": KEY_BLOCK}
    tensors, calibration = read_calibrated(path, ["thresholds"], Calibration, grid, COMMAND)
    thresholds = tensors["thresholds"]
    if thresholds.ndim != 4 or len(thresholds) != len(calibration.ks) or bool(thresholds.isnan().any()):
        raise ValueError(
            f"{path} has thresholds of shape {tuple(thresholds.shape)} for {len(calibration.ks)} ks, expected (ks, "
            f"layers, heads, positions) without NaN: make it again with python -m {COMMAND}"
        )
    return thresholds, calibration
