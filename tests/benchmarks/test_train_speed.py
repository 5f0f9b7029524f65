"""The training-speed benchmark, as far as it runs without a CUDA device."""

import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import litgpt_peer, train_speed
from benchmarks.report import write_csv
from benchmarks.train_speed import KINDS, Row, main, network, random_batch, show
from model.config import ModelConfig
from model.flops import train_flops
from training.module import LanguageModule
from training.step.optim import OptimizerConfig


@pytest.mark.parametrize("kind", KINDS)
def test_steps_take_its_batches(kind: str) -> None:
    config = network("smoke", kind)
    batch = random_batch(config, tokens=96, lengths=[32] * 3, length=32)
    module = LanguageModule(config, OptimizerConfig(), loss_backend="chunked")
    prepared = module.on_before_batch_transfer(batch, 0)
    assert prepared["flops"] > 0 and prepared["valid_tokens"] == 96
    assert torch.isfinite(module.training_step(prepared, 0)["loss"])


def test_rows_show_what_did_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    show(Row("1b", "softmax", "none", "full", 32768, 32768, None, None, None, None, None, "out of memory"))
    assert capsys.readouterr().out.split() == [
        "1b",
        "softmax",
        "none",
        "full",
        "32768",
        "32768",
        *"----",
        "out",
        "of",
        "memory",
    ]


def test_rows_are_written(tmp_path: Path) -> None:
    row_of_table = Row("1b", "softmax", "rowwise", "full", 32768, 4096, 7.0, 0.5, 2.0, 1.0, None)
    write_csv([asdict(row_of_table)], tmp_path / "new" / "x.csv")
    header, row = (tmp_path / "new" / "x.csv").read_text().splitlines()
    assert (
        header.startswith("model,attention,float8,checkpointing,tokens,length")
        and row == "1b,softmax,rowwise,full,32768,4096,7.0,0.5,2.0,1.0,,"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it needs where there is no CUDA device")
def test_needs_cuda(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["train_speed"])
    assert main() == 2 and "needs a CUDA device" in capsys.readouterr().err


def test_rows_of_fp8(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Each of --float8 trains a model of its own; the rows say which."""
    trained = []

    class OnCpu(train_speed.Trial):
        def __init__(self, config: ModelConfig, loss_backend: str, ranks: int, options: dict[str, Any]) -> None:
            self.module = LanguageModule(config, OptimizerConfig(), **options | {"compile": False})
            self.config = self.module.network_config
            self.optimizer = torch.optim.AdamW(self.module.parameters())

        def measure(self, tokens: int, length: int, steps: int, warm_up: int) -> dict[str, float]:
            trained.append((self.module.float8, self.module.converted))
            return {}

    monkeypatch.setattr(train_speed, "Trial", OnCpu)
    for name, value in (("is_available", True), ("get_device_name", "H200"), ("get_device_capability", (9, 0))):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    options = ["--models", "smoke", "--kinds", "softmax", "--lengths", "64", "--float8", "none", "rowwise"]
    monkeypatch.setattr("sys.argv", ["train_speed", *options, "--output", str(tmp_path / "x.csv")])
    assert main() == 0
    assert [name for name, _ in trained] == ["none", "rowwise"] and trained[0][1] is None and trained[1][1].float8 > 0
    assert [line.split()[:3] for line in capsys.readouterr().out.splitlines()[2:]] == [
        ["smoke", "softmax", recipe] for recipe in ("none", "rowwise")
    ]


@pytest.mark.skipif(find_spec("litgpt") is not None, reason="says what it needs where LitGPT is not installed")
def test_a_peer_that_is_not_installed_ends_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("sys.argv", ["train_speed", "--peers", "litgpt"])
    assert main() == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: --peers litgpt needs the package litgpt") and not captured.out


def test_fp8_without_torchao_ends_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("training.step.float8.find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["train_speed", "--float8", "none", "rowwise"])
    assert main() == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: model.float8 is 'rowwise', but torchao is not installed")
    assert not captured.out


def test_steps_of_litgpt_train(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small model in the package's place."""

    class Small(torch.nn.Module):
        def __init__(self, config: int) -> None:
            super().__init__()
            self.longest, self.layers = (
                config,
                torch.nn.Sequential(torch.nn.Embedding(32000, 4), torch.nn.Linear(4, 32000)),
            )

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            assert tokens.shape == (2, 64) and self.longest == 128
            return self.layers(tokens)

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses.append(torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten()))
        return losses[-1]

    losses: list[torch.Tensor] = []
    config = SimpleNamespace(from_name=lambda name, block_size: block_size)
    parts = {"config": {"Config": config}, "model": {"GPT": Small}, "utils": {"chunked_cross_entropy": loss}}
    monkeypatch.setattr(litgpt_peer, "find_spec", lambda name: name)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    monkeypatch.setitem(sys.modules, "litgpt", ModuleType("litgpt"))
    for name, contents in parts.items():
        module = ModuleType(f"litgpt.{name}")
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, f"litgpt.{name}", module)
    trial = litgpt_peer.LitGPTTrial(128, torch.device("cpu"))
    batch = trial.batch(128, 64)
    assert batch["flops"] == train_flops(network("1b", "softmax"), [64, 64])
    for _ in range(3):
        trial.step(batch)
    assert losses[2] < losses[1] < losses[0]
