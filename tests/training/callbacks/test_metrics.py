"""What is logged, when, and what it is worth."""

import csv
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.training.conftest import TrainProcess
from training.callbacks.metrics import (
    MetricsLogger,
    StatsConfig,
    ValidationConfig,
    device_peak,
    first_tokens,
    head_metrics,
    perplexity,
    spread,
)
from training.resume.start_point import StartPoint
from training.throughput import StepClock


@pytest.fixture(scope="module")
def logged(train: TrainProcess, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, str]]]:
    """stderr and metric rows of a run that logs every 3 of 8 steps and validates every 4."""
    run_dir = tmp_path_factory.mktemp("logged") / "run"
    done = train(
        "--run_dir", run_dir, "--trainer.max_steps", 8, "--trainer.log_every_n_steps", 3, "--stats.every_n_steps", 4,
        "--validation.every_n_steps", 4, "--stats.layers", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with (run_dir / "metrics" / "step-00000000" / "metrics.csv").open(newline="") as file:
        return done.stderr, list(csv.DictReader(file))


def column(rows: list[dict[str, str]], name: str) -> dict[int, float]:
    return {int(row["step"]): float(row[name]) for row in rows if row[name]}


def test_z_loss_is_logged_beside_the_loss(train: TrainProcess, tmp_path: Path) -> None:
    """The first step's loss is that of the run without it; the normaliser of fresh weights is about that of equal
    logits, log 384."""
    found = []
    for z_loss in (0.0, 0.01):
        run_dir = tmp_path / str(z_loss)
        options = ("--trainer.max_steps", 2, "--trainer.log_every_n_steps", 1, "--validation.every_n_steps", 2)
        done = train(
            "--run_dir", run_dir, *options, "--model.z_loss", z_loss, configs=("configs/attention/softmax.yaml",)
        )
        assert done.returncode == 0, done.stderr
        with (run_dir / "metrics" / "step-00000000" / "metrics.csv").open(newline="") as file:
            found.append(list(csv.DictReader(file)))
    without, rows = found
    assert "train/z_loss" not in without[0]
    losses, z_losses = column(rows, "train/loss"), column(rows, "train/z_loss")
    assert losses[1] == pytest.approx(column(without, "train/loss")[1], rel=1e-6)
    assert z_losses[1] == pytest.approx(0.01 * math.log(384) ** 2, rel=0.05)
    # its gradient counts: weights are others after a step, and validation is without it
    assert losses[2] != column(without, "train/loss")[2] and column(rows, "val/loss")[2] < 6.5
    assert column(rows, "train/perplexity")[1] == pytest.approx(math.exp(losses[1]))


def test_rows_come_every_n_steps_and_at_the_end(logged: tuple[str, list[dict[str, str]]]) -> None:
    _, rows = logged
    loss = column(rows, "train/loss")
    assert list(loss) == [3, 6, 8]
    assert loss[8] < loss[3] < 6.5  # log(384) = 5.95 at the start
    for step, value in column(rows, "train/perplexity").items():
        assert value == pytest.approx(math.exp(loss[step]))
    assert column(rows, "train/tokens") == {3: 768, 6: 1536, 8: 2048}
    passes = column(rows, "train/passes")
    assert passes[3] > 0 and passes[6] == pytest.approx(2 * passes[3])
    for name in (
        "train/grad_norm", "train/lr", "throughput/tokens_per_second", "throughput/step_seconds", "memory/peak_gib",
        "throughput/tokens_per_second_per_device",
    ):  # fmt: skip
        assert list(column(rows, name)) == [3, 6, 8] and min(column(rows, name).values()) > 0, name
    assert "throughput/mfu" not in rows[0]


def test_the_learning_rate_is_that_of_the_step(logged: tuple[str, list[dict[str, str]]]) -> None:
    rates = column(logged[1], "train/lr")
    # warm-up 2, then cosine from 1e-2 to 1e-3 at the last of 8 steps
    expected = {step: 1e-3 + 9e-3 * 0.5 * (1 + math.cos(math.pi * (step - 1 - 2) / 5)) for step in (3, 6, 8)}
    assert rates == pytest.approx(expected)


def test_validation_and_statistics(logged: tuple[str, list[dict[str, str]]]) -> None:
    stderr, rows = logged
    assert list(column(rows, "val/loss")) == [4, 8]
    assert column(rows, "val/loss")[8] < column(rows, "val/loss")[4] < 6
    assert "step 4: validation loss" in stderr
    assert list(column(rows, "support/layer_01")) == [1, 4, 8] and "support/layer_00" not in rows[0]
    assert all(1 <= value <= 64 for value in column(rows, "support/layer_01").values())
    assert all(0 < value <= 1 for value in column(rows, "live_tiles/layer_01").values())
    means, largest = column(rows, "temperature/layer_01"), column(rows, "temperature_max/layer_01")
    assert list(means) == list(largest) and all(0 < mean < largest[step] for step, mean in means.items())
    for layer in (0, 1):
        for head in (0, 1):
            assert all(1 < a < 2 for a in column(rows, f"alpha/layer_{layer:02d}/head_{head:02d}").values())


def test_gradient_norms_of_all_parts_make_the_whole(logged: tuple[str, list[dict[str, str]]]) -> None:
    rows = logged[1]
    parts = ["alpha", "temperature", "query_key", "value_output", "feed_forward", "embedding", "norm"]
    norms = {part: column(rows, f"grad_norm/{part}") for part in parts}
    assert all(list(each) == [4, 8] and min(each.values()) > 0 for each in norms.values())
    assert {name for name in rows[0] if name.startswith("grad_norm/")} == {f"grad_norm/{part}" for part in parts}
    whole = math.sqrt(sum(each[8] ** 2 for each in norms.values()))
    assert whole == pytest.approx(column(rows, "train/grad_norm")[8], rel=1e-5)


def test_output_that_is_no_terminal_is_one_line_a_log_interval(
    logged: tuple[str, list[dict[str, str]]],
) -> None:
    lines = logged[0].splitlines()
    assert [line.split(":")[0] for line in lines if "tokens/s" in line] == [
        "step 3/8",
        "step 6/8",
        "step 8/8",
    ]
    assert lines[0].startswith("training ") and "loss backend chunked" in lines[0]
    assert len(lines) == 6, lines  # and two validations: no warnings, no banners, no escape codes


def test_statistics_are_silent_for_softmax(train: TrainProcess, tmp_path: Path) -> None:
    done = train("--run_dir", tmp_path / "run", "--trainer.max_steps", 2, configs=("configs/attention/softmax.yaml",))
    assert done.returncode == 0, done.stderr
    header = (tmp_path / "run" / "metrics" / "step-00000000" / "metrics.csv").read_text().splitlines()[0]
    assert "train/loss" in header and "support" not in header and "alpha" not in header


def test_first_tokens_cuts_the_last_document() -> None:
    tokens, bounds = torch.arange(10)[None], torch.tensor([0, 3, 5, 10], dtype=torch.int32)
    for length, expected in ((4, [0, 3, 4]), (5, [0, 3, 5]), (99, [0, 3, 5, 10])):
        piece, cut = first_tokens(tokens, bounds, length)
        assert piece.shape[1] == cut[-1] and cut.tolist() == expected and cut.dtype == torch.int32


@pytest.mark.parametrize(
    ("count", "wanted", "expected"),
    [
        (4, 4, [0, 1, 2, 3]),
        (2, 4, [0, 1]),
        (12, 4, [0, 4, 7, 11]),
        (5, 2, [0, 4]),
        (5, 1, [4]),
        (3, 2, [0, 2]),
    ],
)
def test_sampled_layers_are_spread(count: int, wanted: int, expected: list[int]) -> None:
    assert spread(count, wanted) == expected


def test_small_helpers() -> None:
    assert head_metrics("alpha", None) == {}
    assert head_metrics("alpha", torch.tensor([[1.5, 1.25]])) == {
        "alpha/layer_00/head_00": 1.5, "alpha/layer_00/head_01": 1.25,
    }  # fmt: skip
    assert perplexity(0.0) == 1 and perplexity(1e4) == math.inf
    assert device_peak(torch.device("cpu"), "bf16-mixed") is None
    assert head_metrics("ssmax", torch.tensor([[0.5], [2.0]]), first=1) == {
        "ssmax/layer_00/head_01": 0.5,
        "ssmax/layer_01/head_01": 2.0,
    }


@pytest.mark.parametrize(
    ("config", "arguments"),
    [(StatsConfig, {"every_n_steps": -1}), (StatsConfig, {"layers": 0}), (StatsConfig, {"tokens": 0}),
     (ValidationConfig, {"every_n_steps": -5})],
)  # fmt: skip
def test_bad_settings_name_the_value(config: Any, arguments: dict[str, int]) -> None:
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"{name} is {value}.*expected"):
        config(**arguments)


@pytest.mark.parametrize(("device", "lines"), [("NVIDIA RTX A1000", 1), ("NVIDIA H200", 0)])
def test_a_gpu_of_unknown_peak_is_named_once(
    device: str, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)
    strategy = SimpleNamespace(root_device=torch.device("cuda", 0))
    trainer: Any = SimpleNamespace(global_step=0, log_every_n_steps=1, strategy=strategy, precision="bf16-mixed")
    guard: Any = SimpleNamespace()
    MetricsLogger(StepClock(), guard, StartPoint()).on_train_start(trainer, None)
    said = f"throughput/mfu is not logged: model/flops.py has no peak of {device} in bf16-mixed\n"
    assert capsys.readouterr().err == lines * said
