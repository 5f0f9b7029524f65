"""SIGKILL at random moments, a full disk and truncated checkpoints: nothing is lost and nothing changes.

The long form, with 300 kills, is `make test-faults`.
"""

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from model.checkpoint import checkpoint_folder, find_checkpoints
from model.loading import load_model
from tests.training.conftest import TrainProcess, assert_same_weights, callbacks

LONG = [pytest.mark.faults, pytest.mark.timeout(7200)]


@pytest.mark.parametrize(
    ("processes", "kills", "steps", "asynchronous"),
    [
        pytest.param(1, 4, 60, False, id="short"),
        pytest.param(1, 4, 60, True, id="short, asynchronous"),
        pytest.param(1, 100, 300, False, id="long on one process", marks=LONG),
        pytest.param(2, 100, 300, False, id="long on two processes", marks=LONG),
        pytest.param(1, 50, 300, True, id="long on one process, asynchronous", marks=LONG),
        pytest.param(2, 50, 300, True, id="long on two processes, asynchronous", marks=LONG),
    ],
)
def test_killed_at_random_moments(
    processes: int, kills: int, steps: int, asynchronous: bool, train: TrainProcess, tmp_path: Path
) -> None:
    """At least a third of the kills during saves. A run that gets to its end is compared with an undisturbed one, and
    the next kills meet a new one."""
    began, generator, counted = time.monotonic(), random.Random(0), Counter[str]()
    batch = ("--trainer.devices", processes, "--data.micro_batch_size", 2 // processes)
    options = (*batch, "--trainer.max_steps", steps, "--trainer.log_every_n_steps", 10)
    options = (*options, "--checkpoint.max_failed_saves", 1000)
    undisturbed = train("--run_dir", tmp_path / "undisturbed", *options, quick=True)
    assert undisturbed.returncode == 0, undisturbed.stderr
    options = (*options, "--checkpoint.asynchronous", asynchronous)
    while counted["kills"] < kills or 3 * counted["during a save"] < kills:
        counted["runs"] += 1
        run_dir = tmp_path / f"run-{counted['runs']}"
        done = False
        while not done:
            enough = counted["kills"] >= kills and 3 * counted["during a save"] >= kills
            harm = () if enough else (harms(generator, tmp_path, processes, counted),)
            done = start(train, run_dir, (*options, *harm), counted)
            if not done and generator.random() < 0.1:
                truncate_newest(run_dir, generator, counted)
        assert_same_weights(run_dir, tmp_path / "undisturbed")
    kind = ", asynchronous saves" * asynchronous
    print(f"\n{processes} processes{kind}, {time.monotonic() - began:.0f} s: {dict(counted)}", flush=True)


def harms(generator: random.Random, folder: Path, processes: int, counted: Counter[str]) -> str:
    """A kill, and for one start in eight a disk that is full at every other save."""
    in_save = generator.random() < 0.5
    moment = {"seed": generator.randrange(2**32), "during_save": in_save, "seconds": 0.03 if in_save else 1.5}
    named: list[tuple[str, dict[str, object]]] = [("KillAtRandom", {**moment, "folder": str(folder)})]
    if generator.random() < 1 / 8:
        rank = generator.randrange(processes)
        named.append(("FullDisk", {"rank": rank, "steps": list(range(generator.choice((0, 5)), 1000, 10))}))
        counted["with a full disk"] += 1
    return callbacks(*named)


def start(train: TrainProcess, run_dir: Path, options: tuple[object, ...], counted: Counter[str]) -> bool:
    """Start or continue a run, and count what became of it. Returns whether it got to its end."""
    before = complete_steps(run_dir)
    ended = train("--run_dir", run_dir, *options, "--resume", "auto", quick=True)
    if before:
        assert f"step-{before[-1]:08d} (step {before[-1]})" in ended.stderr or ended.returncode < 0, ended.stderr
    now = complete_steps(run_dir)
    assert now[-1:] >= before[-1:], f"of the checkpoints {before} there are {now}"
    saving = run_dir.parent / "saving"
    if ended.returncode == 0:
        saving.unlink(missing_ok=True)
        return True
    # where one of two ranks was killed first, the other one may have ended by the error that it met
    assert ended.returncode == -signal.SIGKILL or "--trainer.devices" in ended.args, ended.stderr
    counted["kills"] += 1
    counted["during a save"] += saving.exists()
    saving.unlink(missing_ok=True)
    return False


def complete_steps(run_dir: Path) -> list[int]:
    """Steps of the checkpoints that are complete, each of which loads."""
    complete, _ = find_checkpoints(run_dir)
    for info in complete:
        assert load_model(info.path).step == info.step
    return [info.step for info in complete]


def truncate_newest(run_dir: Path, generator: random.Random, counted: Counter[str]) -> None:
    """As a crashed file system leaves it: the run goes on from the one before."""
    steps = complete_steps(run_dir)
    if len(steps) > 1:
        file = generator.choice(sorted(checkpoint_folder(run_dir, steps[-1]).glob("state-*")))
        os.truncate(file, generator.randrange(file.stat().st_size))
        assert complete_steps(run_dir) == steps[:-1]
        counted["truncated"] += 1
