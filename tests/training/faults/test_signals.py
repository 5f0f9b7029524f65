"""A process that is told to stop while its main thread is not in Python; what it says of its state."""

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from common.exits import INTERRUPTED, KEYBOARD
from tests.training.conftest import ROOT
from training.faults.progress import Progress

# A mutex that is locked twice waits in C, signals or not, as a compiler or a collective does.
BLOCKED = """
import ctypes, sys
from training.faults.signals import stop_signals
with stop_signals() as stop:
    stop.progress.note("loading the data", None)
    stop.progress.stepped, stop.grace = "--stepped" in sys.argv, lambda: 1000.0 if "--twice" in sys.argv else 0.1
    mutex = ctypes.create_string_buffer(128)
    print("ready", flush=True)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc's mutexes")
@pytest.mark.parametrize(
    ("options", "signals", "code", "message"),
    [
        ([], [signal.SIGTERM], INTERRUPTED, "stopped by SIGTERM while loading the data, 0:00: nothing new to save"),
        ([], [signal.SIGINT], INTERRUPTED, "stopped by SIGINT while loading the data"),
        (["--stepped"], [signal.SIGUSR1], INTERRUPTED, "stopped by SIGUSR1 without saving: loading the data, 0:0"),
        (["--stepped", "--twice"], [signal.SIGINT] * 2, KEYBOARD, "stopped by a second Ctrl-C, without saving"),
    ],
)
def test_while_the_main_thread_is_in_c(options: list[str], signals: list[int], code: int, message: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKED, *options], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored in the background
    )  # fmt: skip
    assert process.stdout and process.stderr and process.stdout.readline() == "ready\n"
    for signum in signals:
        process.send_signal(signum)
        time.sleep(0.3)  # two signals of a kind merge while the first one is pending
    assert process.wait(60) == code
    assert message in process.stderr.read()


STARTS_A_RANK = """
import os, subprocess, sys
environment = os.environ | {"LONGSPLASH_LAUNCHER_PID": str(os.getpid()), "LOCAL_RANK": "1"}
pipe = int(sys.argv[2])
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=environment, stdout=subprocess.PIPE, pass_fds=[pipe])
rank.stdout.readline()
print(rank.pid, flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc's mutexes")
def test_a_rank_whose_starter_has_ended_ends_when_told_to_stop() -> None:
    """A Ctrl-C reaches both while they wait for each other, and rank 0 ends first."""
    ended, held = os.pipe()
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTS_A_RANK, BLOCKED, str(held)], cwd=ROOT, pass_fds=[held], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    os.close(held)
    assert starter.stdout
    rank = int(starter.stdout.readline())
    starter.kill()
    starter.wait()
    os.kill(rank, signal.SIGTERM)
    try:
        assert select.select([ended], [], [], 30)[0], "rank 1 is still there"
    finally:
        os.close(ended)
        with suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)


@pytest.mark.parametrize(
    ("activity", "stepped", "told"),
    [
        ("loading the data", False, "loading the data, 1:20"),
        ("training", False, "compiling and running the first optimizer step, 1:20"),
        ("training", True, "in optimizer step 8, 1:20"),
        ("validating", True, "validating, 1:20"),
    ],
)
def test_what_is_waited_for_is_told_with_its_time(activity: str, stepped: bool, told: str) -> None:
    progress = Progress()
    progress.stepped = stepped
    progress.note(activity, 7)
    progress.state = progress.state._replace(since=progress.state.since - 80)
    assert str(progress) == told
