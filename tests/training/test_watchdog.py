"""Ranks that hang or die: the run ends in bounded time, says where it was, and leaves no process behind."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from common.exits import STALLED
from tests.training.conftest import ROOT, callbacks, child_environment, command
from training.watchdog import WatchdogConfig


def processes_of(run_dir: Path) -> list[int]:
    """Living processes that have the run's folder among their arguments; zombies have no arguments."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(run_dir) in (folder / "cmdline").read_text().split("\0"):
                found.append(int(folder.name))
        except OSError:
            continue  # it has ended meanwhile
    return found


def run_two_ranks(tiny_config: Path, run_dir: Path, harm: str) -> tuple[int, str]:
    """Exit code and stderr of a run on two processes, of which none may be left."""
    options = ("--run_dir", run_dir, "--trainer.devices", 2, "--watchdog.minutes", 0.05, "--watchdog.first_minutes", 2)
    log = run_dir.parent / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command("--config", tiny_config, *options, harm), env=child_environment(), cwd=ROOT, stderr=stderr,
            start_new_session=True,
        )  # fmt: skip
    try:
        code = process.wait(240)  # a busy machine needs most of it to start
        if code != STALLED:
            wait_for_the_end(run_dir)
        assert not processes_of(run_dir)
    finally:
        for left in processes_of(run_dir):
            os.kill(left, signal.SIGKILL)
        process.wait()
    return code, log.read_text()


def wait_for_the_end(run_dir: Path) -> None:
    """Rank 1 notices within seconds that rank 0 is gone."""
    end = time.monotonic() + 15
    while processes_of(run_dir) and time.monotonic() < end:
        time.sleep(0.1)


def test_a_sleeping_rank_ends_the_run_and_every_rank_says_where_it_was(tiny_config: Path, tmp_path: Path) -> None:
    code, log = run_two_ranks(
        tiny_config, tmp_path / "run", callbacks(("Hang", {"step": 6, "rank": 1, "stopped": False}))
    )
    assert code == STALLED
    reports = {int(report[0]): report for report in log.split("watchdog: rank ")[1:]}
    assert set(reports) == {0, 1}
    # rank 0 waits for the reduction of its gradients
    assert "no progress for 0.05 minutes while training after optimizer step 6; last samples [24, 25]" in reports[0]
    assert "_engine_run_backward" in reports[0] and "faults.py" not in reports[0]
    assert "last samples [26, 27]" in reports[1] and 'faults.py", line' in reports[1]


def test_a_stopped_rank_ends_the_run(tiny_config: Path, tmp_path: Path) -> None:
    code, log = run_two_ranks(
        tiny_config, tmp_path / "run", callbacks(("Hang", {"step": 6, "rank": 0, "stopped": True}))
    )
    assert code == -signal.SIGKILL  # a stopped process takes no other signal
    assert "watchdog: rank 1 of 2: no progress" in log


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_run(rank: int, tiny_config: Path, tmp_path: Path) -> None:
    code, log = run_two_ranks(tiny_config, tmp_path / "run", callbacks(("KillRank", {"step": 6, "rank": rank})))
    assert code != 0, log


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"minutes": -1}, "minutes is -1: expected a finite number at least 0 .0: never."),
     ({"minutes": 5, "first_minutes": 3}, "first_minutes is 3: expected at least .* 5")],
)  # fmt: skip
def test_bad_config(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"watchdog.{message}"):
        WatchdogConfig(**arguments)
