"""train.py on a length-generalisation task."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import train as train_script
from model.checkpoint import checkpoint_folder, read_complete
from tests.training.conftest import ROOT, assert_same_weights, command, logged, run_train

CONFIGS = ROOT / "configs"
TINY = """
model:
  network: {d_model: 16, n_heads: 2, n_kv_heads: 2, d_ff: 32}
  optimizer: {warmup_steps: 2}
data: {global_batch_size: 4, micro_batch_size: 2, val_sequences: 4, num_workers: 0}
checkpoint: {every_n_steps: 3}
stats: {every_n_steps: 2}
trainer: {max_steps: 6, log_every_n_steps: 1}
validation: {every_n_steps: 3}
"""
Main, Options = Callable[..., int], Callable[..., list[object]]


@pytest.fixture(scope="module")
def copy_options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    """train.py's options that train a tiny model on Copy with further options."""
    tiny = tmp_path_factory.mktemp("config") / "tiny.yaml"
    tiny.write_text(TINY)
    names = ["length_generalisation/copy.yaml", "attention/asentmax.yaml", "cluster/cpu.yaml"]
    files = [*(CONFIGS / name for name in names), tiny]
    configs = [part for file in files for part in ("--config", file)]
    return lambda *options: [*configs, *options]


@pytest.fixture(scope="module")
def whole(copy_options: Options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of six steps in a process of its own."""
    run_dir = tmp_path_factory.mktemp("copy") / "whole"
    run_process(copy_options("--run_dir", run_dir))
    return run_dir


def run_process(options: list[object]) -> None:
    done = run_train(*options)
    assert done.returncode == 0, done.stderr
    assert "4 x 130 tokens a step" in done.stderr and "step 6: validation loss" in done.stderr


@pytest.fixture
def main(copy_options: Options, monkeypatch: pytest.MonkeyPatch) -> Main:
    """Train in this process and return the exit code."""

    def run(*options: object) -> int:
        monkeypatch.setattr(sys, "argv", command(*copy_options(*options))[1:])
        monkeypatch.chdir(ROOT)
        try:
            train_script.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run


def test_a_resumed_run_is_bit_identical(whole: Path, main: Main, tmp_path: Path) -> None:
    resumed = tmp_path / "resumed"
    shutil.copytree(checkpoint_folder(whole, 3), checkpoint_folder(resumed, 3))
    assert main("--run_dir", resumed, "--resume", "auto") == 0
    assert_same_weights(whole, resumed)
    assert {step: logged(whole)[step] for step in (4, 5, 6)} == logged(resumed)


def test_two_processes_take_the_same_steps(whole: Path, copy_options: Options, tmp_path: Path) -> None:
    run_process(copy_options("--run_dir", tmp_path / "two", "--trainer.devices", 2))
    alone, together = logged(whole), logged(tmp_path / "two")
    assert alone.keys() == together.keys() == set(range(1, 7))
    for step, values in alone.items():
        assert together[step] == pytest.approx(values, rel=1e-5), step


def test_the_checkpoint_knows_its_task(whole: Path, main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    meta = read_complete(checkpoint_folder(whole, 6)).meta
    assert meta["tokenizer"]["path"] == "task:copy" and meta["sequence_length"] == 130
    assert (meta["samples"], meta["tokens"]) == (24, 24 * 130)
    again = ("--run_dir", whole, "--resume", "auto", "--trainer.max_steps", 8)
    assert main(*again, "--data.task.name", "reverse") == 2
    assert "was trained with tokenizer task:copy" in capsys.readouterr().err
    assert main(*again, "--data.task.min_length", 16) == 2
    assert "was trained with data.task {'name': 'copy', 'min_length': 32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--data.task.name", "sorting"], ["data.task.name", "local_count", "sorting"]),
        (["--data.task.max_length", 100], ["data.sequence_length is 130", "up to 202 tokens"]),
        (["--data.task.min_length", 65], ["min_length and max_length are 65 and 64"]),
        (["--data.sources", "[{path: x}]"], ["data.task.name is copy", "data.sources"]),
        (["--model.network.vocab_size", 34], ["vocab_size is 34", "task:copy", "35"]),
    ],
)
def test_one_line_for_each_mistake(
    options: list[object], parts: list[str], main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("--run_dir", tmp_path / "run", *options) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and all(part in lines[-1] for part in parts), lines
