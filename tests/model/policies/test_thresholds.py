"""The file of thresholds: what is read is what was written, or is named."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model.policies.calibrated_files import _checksum
from model.policies.thresholds import Calibration, read_thresholds, save_thresholds

CALIBRATION = Calibration("model", "run", 1, [1, 2], 256, 4, "mean", [0.1, 0.2], None)
THRESHOLDS = torch.arange(16.0).reshape(2, 1, 4, 2)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    endless = THRESHOLDS.clone()
    endless[0, 0, 0, 0] = -torch.inf  # everything is kept
    save_thresholds(tmp_path / "new" / "t", endless, CALIBRATION)
    found, calibration = read_thresholds(tmp_path / "new" / "t")
    assert torch.equal(found, endless) and calibration == CALIBRATION
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["t"]


@pytest.mark.parametrize(
    ("thresholds", "changes", "message"),
    [
        (THRESHOLDS.clone().fill_(torch.nan), {}, "without NaN"),
        (THRESHOLDS[:1], {}, r"shape \(1, 1, 4, 2\) for 2 ks"),
        (THRESHOLDS[0], {}, r"shape \(1, 4, 2\) for 2 ks"),
        (THRESHOLDS, {"ks": 2}, "ks .*expected a list"),
        (THRESHOLDS, {"format": 1}, "has format, query_block, key_block"),
        (THRESHOLDS, {"format": 2}, "has format, query_block, key_block"),
        (THRESHOLDS, {"step": None}, "step .*expected a whole number"),
    ],
)
def test_what_is_damaged_is_named(thresholds: Tensor, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path, text = tmp_path / "t", json.dumps(asdict(CALIBRATION) | changes)
    metadata = {"calibration": text, "checksum": _checksum({"thresholds": thresholds}, text)}
    save_file({"thresholds": thresholds.contiguous()}, path, metadata)
    with pytest.raises(ValueError, match=f"{path}.*{message}.*make it again with python -m eval.calibrate"):
        read_thresholds(path)


@pytest.mark.parametrize("content", [b"", b"text", b"\x02\x00\x00\x00\x00\x00\x00\x00[]"])
def test_another_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(ValueError, match="t holds no thresholds of eval.calibrate"):
        read_thresholds(tmp_path / "t")


@pytest.mark.parametrize("bit", [0, 2, 6])
def test_a_flipped_bit_is_named_wherever_it_is(bit: int, tmp_path: Path) -> None:
    path = tmp_path / "t"
    save_thresholds(path, THRESHOLDS, CALIBRATION)
    content = path.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"^{path} .*make it again with python -m eval.calibrate"):
            read_thresholds(path)
