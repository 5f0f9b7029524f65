"""Weights and losses that are not finite: never saved, and no run ends with them as if all were well."""

import json
from pathlib import Path

import torch

from common.exits import DIVERGED
from model.checkpoint import find_checkpoints
from tests.training.conftest import TrainProcess, callbacks
from training.distributed.checkpoint_state import Fragment, TrainingState, not_finite

NORM = "weight/blocks.0.attention_norm.weight"


def complete_steps(run_dir: Path) -> list[int]:
    return [found.step for found in find_checkpoints(run_dir)[0]]


def test_weights_of_one_rank_end_the_run_in_the_next_step(train: TrainProcess, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = train("--run_dir", run, callbacks(("BadWeight", {"step": 12, "rank": 1})), "--trainer.devices", 2)
    assert done.returncode == DIVERGED, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(
        f"error: {NORM} is not finite after step 12, so that it was not saved: the newest checkpoint"
    )
    assert f"is {run}/checkpoints/step-00000010;" in line and "exit code 65" in line
    assert complete_steps(run) == [5, 10]
    reason = json.loads((run / "failures" / "step-00000013" / "step.json").read_text())["reason"]
    assert reason == f"its loss is nan, and {NORM} is not finite after step 12"
    resumed = train("--run_dir", run, "--resume", "auto", "--trainer.devices", 2)
    assert resumed.returncode == 0 and complete_steps(run) == [15, 20], resumed.stderr


def test_weights_of_the_last_step_are_not_saved(train: TrainProcess, tmp_path: Path) -> None:
    done = train("--run_dir", tmp_path, callbacks(("BadWeight", {"step": 20, "rank": 0})))
    assert done.returncode == DIVERGED, done.stderr
    assert f"error: {NORM} is not finite after step 20, so that it was not saved" in done.stderr
    assert complete_steps(tmp_path) == [10, 15]


def test_steps_that_are_not_skipped_are_not_saved_either(train: TrainProcess, tmp_path: Path) -> None:
    bad = callbacks(("BadGradient", {"steps": [7], "rank": 0}))
    done = train("--run_dir", tmp_path, bad, "--guard.skip_nonfinite", "false")
    assert done.returncode == DIVERGED, done.stderr
    assert "is not finite after step 7, so that it was not saved" in done.stderr
    assert complete_steps(tmp_path) == [5] and "step 20/20" not in done.stderr


def test_a_last_loss_that_is_not_finite_is_no_good_end(train: TrainProcess, tmp_path: Path) -> None:
    done = train("--run_dir", tmp_path / "middle", callbacks(("BadLoss", {"steps": [7]})))
    assert done.returncode == 0, done.stderr
    done = train("--run_dir", tmp_path / "end", callbacks(("BadLoss", {"steps": [20]})))
    assert done.returncode == DIVERGED, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: the loss of the last step, 20, is nan")
    assert complete_steps(tmp_path / "end") == [15, 20]


def test_state_of_the_optimizer_counts_too() -> None:
    def state(**values: list[float]) -> TrainingState:
        fragments = [Fragment(key, 0, torch.tensor(value)) for key, value in values.items()]
        return TrainingState({}, fragments, replicated=True, steps={})

    assert not_finite(state(weight=[1.0, 2.0], exp_avg=[], exp_avg_sq=[3e38])) is None
    assert not_finite(state(weight=[1.0, 2.0], exp_avg_sq=[0.0, torch.inf])) == "exp_avg_sq"
    assert not_finite(state(weight=[1.0, torch.nan], exp_avg_sq=[torch.inf])) == "weight"
