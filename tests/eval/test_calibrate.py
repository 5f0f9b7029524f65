"""python -m eval.calibrate on a small model trained for a moment, and what eval.run and eval.generate do with its file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import eval.calibrate
import eval.generate
import eval.run
from data.store import TokenStore
from eval.calibrate import choose_windows
from model.checkpoint import checkpoint_folder, load_model, write_complete
from model.policies.thresholds import read_thresholds
from tests.eval.conftest import MakeRun

LENGTH = 1024


@pytest.fixture(scope="module")
def run(make_run: MakeRun, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A softmax run after 40 steps, so that its scores differ from place to place as those of trained models do."""
    folder = make_run(tmp_path_factory.mktemp("calibrate") / "softmax", "softmax")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    loaded = load_model(folder)
    model, store = loaded.model.train(), TokenStore(corpus / "train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step, (document, start) in enumerate(choose_windows(store, 257, 40, 0)):
        text = torch.from_numpy(store.document(document)[start : start + 257].astype(np.int64))
        loss = torch.nn.functional.cross_entropy(model.logits(model(text[None, :-1]))[0], text[1:])
        first = loss.item() if step == 0 else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < first - 1
    trained = checkpoint_folder(folder, 47)
    trained.mkdir()
    save_file({f"weight/{name}": value for name, value in model.state_dict().items()}, trained / "state-00000.safetensors")
    meta = json.loads((loaded.path / "complete.json").read_text())
    write_complete(trained, {key: meta[key] for key in meta if key not in ("files", "tensors", "format")} | {"step": 47})
    return folder


@pytest.fixture(scope="module")
def thresholds(run: Path, corpus: Path) -> Path:
    path = run / "thresholds.safetensors"
    arguments = [str(run), "--data", str(corpus), "--output", str(path), "--device", "cpu"]
    arguments += ["--ks", "2", "4", "7", "--samples", "16", "--length", str(LENGTH)]
    assert eval.calibrate.main(arguments) == 0
    return path


def failing_line(capsys: pytest.CaptureFixture[str], command: Any, *arguments: object) -> str:
    capsys.readouterr()
    assert command([str(argument) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_held_out_density_is_as_predicted(thresholds: Path) -> None:
    """Within 0.05 at three levels."""
    values, calibration = read_thresholds(thresholds)
    assert values.shape == (3, 2, 2, LENGTH // 128)
    assert calibration.samples == 16 and calibration.length == LENGTH and calibration.step == 47
    assert calibration.measured is not None
    print(calibration.predicted, calibration.measured)
    for predicted, measured in zip(calibration.predicted, calibration.measured, strict=True):
        assert abs(predicted - measured) < 0.05
    assert max(calibration.predicted) - min(calibration.predicted) > 0.25


def test_file_is_one_tensor_with_its_model(thresholds: Path) -> None:
    assert list(load_file(thresholds)) == ["thresholds"]
