"""Signals: saved at a step boundary by all ranks, told by the exit code, continued exactly."""

import os
import signal
import subprocess
import time
from pathlib import Path

from common.exits import INTERRUPTED, KEYBOARD
from model.checkpoint import find_checkpoints
from tests.training.conftest import ROOT, TrainProcess, assert_same_weights, callbacks, child_environment, command
from training.faults.interruption import Interruption, InterruptionConfig
from training.faults.progress import Progress
from training.faults.signals import STOP_SIGNALS, LocalRanks, StopSignals


def interruption() -> Interruption:
    """One that no signal reaches."""
    return Interruption(InterruptionConfig(), StopSignals(Progress(), LocalRanks()), None)


def steps_of(run_dir: Path) -> list[int]:
    return [info.step for info in find_checkpoints(run_dir)[0]]


def test_a_signal_to_one_of_two_ranks_stops_both_at_the_same_step_and_resume_is_exact(
    train: TrainProcess, tmp_path: Path
) -> None:
    options = ("--run_dir", tmp_path / "run", "--trainer.devices", 2)
    stopped = train(*options, callbacks(("SignalInStep", {"step": 7, "rank": 1, "name": "SIGTERM"})))
    assert stopped.returncode == INTERRUPTED, stopped.stderr
    assert stopped.stderr.splitlines()[-1] == (
        "stopped by a signal at step 8, which is saved: the same command with --resume auto continues (exit code 75)"
    )
    assert steps_of(tmp_path / "run") == [5, 8]
    resumed = train(*options, "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    undisturbed = train("--run_dir", tmp_path / "undisturbed", "--trainer.devices", 2)
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert_same_weights(tmp_path / "run", tmp_path / "undisturbed")


def test_ctrl_c_once_saves_and_twice_stops_at_once(train: TrainProcess, tmp_path: Path) -> None:
    interrupt = {"step": 7, "rank": 0, "name": "SIGINT"}
    once = train("--run_dir", tmp_path / "once", callbacks(("SignalInStep", interrupt)))
    assert once.returncode == INTERRUPTED and steps_of(tmp_path / "once") == [5, 8]
    assert "Ctrl-C again stops at once" in once.stderr
    twice = train("--run_dir", tmp_path / "twice", callbacks(("SignalInStep", {**interrupt, "times": 2})))
    assert twice.returncode == KEYBOARD and steps_of(tmp_path / "twice") == [5]


def test_before_the_first_step_has_ended_a_signal_ends_the_run_at_once(train: TrainProcess, tmp_path: Path) -> None:
    first = ("SignalInStep", {"step": 0, "rank": 0, "name": "SIGUSR1"}), ("Hang", {"step": 0, "rank": 0})
    stopped = train("--run_dir", tmp_path / "run", callbacks(*first))
    assert stopped.returncode == INTERRUPTED, stopped.stderr
    assert "stopped by SIGUSR1 while " in stopped.stderr
    assert "nothing new to save" in stopped.stderr and steps_of(tmp_path / "run") == []


def test_a_step_that_does_not_end_is_given_the_grace_time_on_all_ranks(train: TrainProcess, tmp_path: Path) -> None:
    stuck = ("SignalInStep", {"step": 7, "rank": 1, "name": "SIGTERM"}), ("Hang", {"step": 7, "rank": 1})
    options = ("--run_dir", tmp_path / "run", "--trainer.devices", 2, "--interruption.grace_seconds", 1)
    stopped = train(*options, callbacks(*stuck))  # returns when no process is left that holds its pipes
    assert stopped.returncode == INTERRUPTED, stopped.stderr
    assert "waiting for the optimizer step to end, 0:00 of at most 0:0" in stopped.stderr
    assert (
        "without saving: in optimizer step 8, 0:0" in stopped.stderr
        and "(interruption.grace_seconds)" in stopped.stderr
    )
    assert steps_of(tmp_path / "run") == [5]


def test_a_validation_is_cut_short_and_what_was_trained_is_saved(train: TrainProcess, tmp_path: Path) -> None:
    options = ("--run_dir", tmp_path / "run", "--validation.every_n_steps", 7)
    stopped = train(*options, callbacks(("SignalInValidation", {"rank": 0})))
    assert stopped.returncode == INTERRUPTED and steps_of(tmp_path / "run") == [5, 8], stopped.stderr
    assert "step 7: told to stop, so this validation was not finished" in stopped.stderr
    assert "validation loss" not in stopped.stderr


def test_max_time_ends_as_a_signal_does(train: TrainProcess, tmp_path: Path) -> None:
    options = ("--run_dir", tmp_path / "run", "--trainer.max_time", "00:00:00:01", "--trainer.max_steps", 1000)
    stopped = train(*options, callbacks(("Pause", {"seconds": 0.2})))
    (*_, newest) = steps_of(tmp_path / "run")
    assert stopped.returncode == INTERRUPTED, stopped.stderr
    assert f"stopped by trainer.max_time 0:00:01 at step {newest}, which is saved" in stopped.stderr


def test_in_the_background_ctrl_c_stays_ignored() -> None:
    before = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    try:
        for keyboard in (signal.SIG_IGN, signal.default_int_handler):
            signal.signal(signal.SIGINT, keyboard)
            stop = StopSignals(Progress(), LocalRanks())
            stop.progress.stepped, stop.grace = True, lambda: 100.0
            stop.install()
            signal.raise_signal(signal.SIGINT)
            assert stop.requested == (keyboard != signal.SIG_IGN)
            signal.raise_signal(signal.SIGTERM)
            assert stop.requested
            stop.close()
            assert signal.getsignal(signal.SIGINT) == keyboard
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def test_a_signal_to_all_processes_of_a_run_spares_loader_workers_and_adds_no_validation(
    tiny_config: Path, tmp_path: Path
) -> None:
    options: tuple[object, ...] = ("--run_dir", tmp_path / "run", "--data.num_workers", 2)
    options += ("--trainer.max_steps", 400, "--validation.every_n_steps", 400)
    log = tmp_path / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command("--config", tiny_config, *options, callbacks(("Pause", {"seconds": 0.05}))),
            env=child_environment(), cwd=ROOT, stderr=stderr, start_new_session=True,
        )  # fmt: skip
    try:
        while "step 4/400" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) == INTERRUPTED, log.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    (*_, newest) = steps_of(tmp_path / "run")
    assert f"stopped by a signal at step {newest}, which is saved" in log.read_text()
    assert "validation" not in log.read_text()
