"""Loader processes: spared by the signals that stop a run, gone with the run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import os, signal, sys, time
from data.workers import start_worker, worker_context

def work(ready):
    start_worker(0)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(os.getpid(), signum)
    os.write(ready, str(os.getpid()).encode())
    time.sleep(1000)  # in the middle of a batch

read, write = os.pipe()
worker_context().Process(target=work, args=(write,), daemon=True).start()
print(os.read(read, 20).decode(), flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
raise ValueError("a user error")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are not forked there")
@pytest.mark.parametrize(("end", "code"), [("error", 1), ("killed", -signal.SIGKILL)])
def test_a_busy_worker_spared_by_stop_signals_ends_with_its_run(end: str, code: int) -> None:
    done = subprocess.run([sys.executable, "-c", RUN, end], cwd=ROOT, capture_output=True, text=True, timeout=60)
    worker = int(done.stdout)
    try:
        assert done.returncode == code, done.stderr
        for _ in range(200):
            if not Path(f"/proc/{worker}").exists() or "State:\tZ" in Path(f"/proc/{worker}/status").read_text():
                return
            time.sleep(0.05)
        pytest.fail("the worker is still there")
    finally:
        if Path(f"/proc/{worker}").exists():
            os.kill(worker, signal.SIGKILL)
