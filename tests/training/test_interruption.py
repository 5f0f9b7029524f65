"""Signals: saved at a step boundary by all ranks, told by the exit code, continued exactly."""

import os
import signal
import subprocess
import time
from pathlib import Path

from lightning.pytorch import Trainer

from common.exits import INTERRUPTED
from model.checkpoint import find_checkpoints
from tests.training.conftest import ROOT, TrainProcess, assert_same_weights, callbacks, child_environment, command
from training.interruption import STOP_SIGNALS, Interruption


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
    assert twice.returncode == 1 and steps_of(tmp_path / "twice") == [5]


def test_in_the_background_ctrl_c_stays_ignored() -> None:
    before = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    try:
        for keyboard in (signal.SIG_IGN, signal.default_int_handler):
            signal.signal(signal.SIGINT, keyboard)
            stop = Interruption()
            stop.on_train_start(Trainer(logger=False, enable_checkpointing=False), None)
            signal.raise_signal(signal.SIGINT)
            assert stop.requested == (keyboard != signal.SIG_IGN)
            signal.raise_signal(signal.SIGTERM)
            assert stop.requested
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
