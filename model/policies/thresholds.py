"""The file of BSFA's calibrated thresholds: one tensor, and what it was calibrated on."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kernels import KEY_BLOCK, QUERY_BLOCK
from model.checkpoint import share

FORMAT = 2
Estimator = Literal["mean", "pooled"]  # of ThresholdCollector


@dataclass(frozen=True)
class Calibration:
    """What stands beside the thresholds in their file.

    model: fingerprint of the model they belong to (model.checkpoint.model_fingerprint). checkpoint, step: where it was.
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
    """thresholds: float32 (ks, L, H, P). Written aside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    save_file({"thresholds": thresholds.contiguous()}, aside, {"calibration": json.dumps(asdict(calibration))})
    share(aside)
    aside.rename(path)


def read_thresholds(path: Path) -> tuple[Tensor, Calibration]:
    """Raises FileNotFoundError, or ValueError for a file that save_thresholds did not write."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; calibrate the checkpoint first: python -m eval.calibrate ...")
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {})["calibration"])
            thresholds = file.get_tensor("thresholds")
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} holds no thresholds of eval.calibrate ({error})") from error
    grid = (content.get("format"), content.get("query_block"), content.get("key_block"))
    if grid != (FORMAT, QUERY_BLOCK, KEY_BLOCK):
        raise ValueError(
            f"{path} has format and blocks {grid}, expected {(FORMAT, QUERY_BLOCK, KEY_BLOCK)}: calibrate again"
        )
    return thresholds, Calibration(**content)
