"""The trace of a few steps."""

import gzip
import json
from pathlib import Path

import pytest

from tests.training.conftest import TrainProcess, callbacks
from training.callbacks.profiling import ProfileConfig


def optimizer_steps(path: Path) -> int:
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
    return sum(event.get("name", "").startswith("Optimizer.step#") for event in events)


def test_a_trace_holds_the_steps_that_were_asked_for(train: TrainProcess, tmp_path: Path) -> None:
    done = train("--run_dir", tmp_path / "run", "--profile.steps", 2, "--profile.start", 3, "--trainer.max_steps", 7)
    assert done.returncode == 0, done.stderr
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    assert trace.name == "step-00000003.rank-0.json.gz" and optimizer_steps(trace) == 2


def test_a_session_that_ends_earlier_still_writes_its_trace(train: TrainProcess, tmp_path: Path) -> None:
    stop = callbacks(("SignalInStep", {"step": 4, "rank": 0, "name": "SIGUSR1"}))
    done = train("--run_dir", tmp_path / "run", "--profile.steps", 50, "--profile.start", 3, stop)
    assert done.returncode == 75, done.stderr
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    assert optimizer_steps(trace) == 2


def test_a_rank_that_does_not_exist(train: TrainProcess, tmp_path: Path) -> None:
    done = train("--run_dir", tmp_path / "run", "--profile.steps", 1, "--profile.rank", 4)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: profile.rank is 4: expected one of")


@pytest.mark.parametrize("name", ["steps", "start", "rank"])
def test_bad_config(name: str) -> None:
    with pytest.raises(ValueError, match=f"profile.{name} is -1: expected a whole number at least 0"):
        ProfileConfig(**{name: -1})
