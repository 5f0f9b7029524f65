"""A process that ends without taking down its interpreter ends as Python says, and other threads cannot abort it."""

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(script: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )


BEGIN = """
import atexit, sys, threading, time
from common.ending import run_and_end
atexit.register(print, "exit handler")
def late():
    time.sleep(0.2)
    print("thread")
threading.Thread(target=late).start()
"""


@pytest.mark.parametrize(
    ("main", "code", "stderr"),
    [
        ("lambda: None", 0, ""),
        ("lambda: sys.exit()", 0, ""),
        ("lambda: sys.exit(75)", 75, ""),
        ("lambda: sys.exit(-1)", 255, ""),
        ("lambda: sys.exit('a message')", 1, "a message\n"),
        ("lambda: 1 / 0", 1, "ZeroDivisionError: division by zero\n"),
    ],
)
def test_ends_as_python_does(main: str, code: int, stderr: str) -> None:
    ended = python(BEGIN + f"run_and_end({main})")
    plain = python(BEGIN + f"({main})()")
    for process in (ended, plain):
        assert process.returncode == code
        assert process.stdout.splitlines() == ["thread", "exit handler"]
        assert process.stderr.endswith(stderr) and bool(process.stderr) == bool(stderr)


GLOO = """
import os, sys, tempfile
import torch
import torch.distributed as dist
from common.ending import run_and_end

def rank(number, store):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    dist.barrier()
    for thread in map(int, os.listdir("/proc/self/task")):
        if thread != os.getpid():  # gloo's own come last, as they do at times on a busy machine
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
    for _ in range(3):
        dist.all_reduce(torch.ones(4))

codes = []
for _ in range(ROUNDS):
    store = tempfile.mktemp()
    ranks = []
    for number in range(2):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            END(lambda: rank(number, store))
    codes += [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
print(codes, flush=True)
os._exit(0)
"""


def test_threads_of_gloo_cannot_abort_it() -> None:
    """A quarter of these processes end with SIGABRT where the interpreter is taken down."""
    ended = python(GLOO.replace("END", "run_and_end").replace("ROUNDS", "4"))
    assert ended.stdout == f"{[0] * 8}\n", ended.stderr


def test_training_ends_so(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[Callable[[], object]] = []
    monkeypatch.setattr("common.ending.run_and_end", ended.append)
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert [main.__name__ for main in ended] == ["main"]
