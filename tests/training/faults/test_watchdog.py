"""Ranks that hang or die: the run ends in bounded time, says where it was, and leaves no process behind."""

import signal
from pathlib import Path

import pytest

from common.exits import STALLED
from tests.training.conftest import TrainProcess, callbacks
from training.faults.watchdog import WatchdogConfig


def run_two_ranks(train: TrainProcess, run_dir: Path, harm: str) -> tuple[int, str]:
    """Exit code and stderr of a run on two processes, none of which is left."""
    ended = train(
        "--run_dir", run_dir, "--trainer.devices", 2, "--watchdog.minutes", 0.05, "--watchdog.first_minutes", 2, harm
    )  # fmt: skip
    return ended.returncode, ended.stderr


def test_a_sleeping_rank_ends_the_run_and_every_rank_says_where_it_was(train: TrainProcess, tmp_path: Path) -> None:
    code, log = run_two_ranks(train, tmp_path / "run", callbacks(("Hang", {"step": 6, "rank": 1, "stopped": False})))
    assert code == STALLED
    reports = {int(report[0]): report for report in log.split("watchdog: rank ")[1:]}
    assert set(reports) == {0, 1}
    # rank 0 waits for the reduction of its gradients
    assert "no progress for 0.05 minutes while training after optimizer step 6; last samples [24, 25]" in reports[0]
    assert "_engine_run_backward" in reports[0] and "faults/callbacks.py" not in reports[0]
    assert "last samples [26, 27]" in reports[1] and 'faults/callbacks.py", line' in reports[1]


def test_a_stopped_rank_ends_the_run(train: TrainProcess, tmp_path: Path) -> None:
    code, log = run_two_ranks(train, tmp_path / "run", callbacks(("Hang", {"step": 6, "rank": 0, "stopped": True})))
    assert code == -signal.SIGKILL  # a stopped process takes no other signal
    assert "watchdog: rank 1 of 2: no progress" in log


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_run(rank: int, train: TrainProcess, tmp_path: Path) -> None:
    code, log = run_two_ranks(train, tmp_path / "run", callbacks(("KillRank", {"step": 6, "rank": rank})))
    # rank 0 is the command; without its peer its collectives fail
    assert code == (-signal.SIGKILL if rank == 0 else 1), log
    assert rank == 0 or "Gloo" in log or "gloo" in log


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"minutes": -1}, "minutes is -1: expected a finite number at least 0 .0: never."),
     ({"minutes": 5, "first_minutes": 3}, "first_minutes is 3: expected at least .* 5")],
)  # fmt: skip
def test_bad_config(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"watchdog.{message}"):
        WatchdogConfig(**arguments)
