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


ENDS_LOADER = """
import time
from torch.utils.data import DataLoader, Dataset
from data.workers import start_worker, worker_context

class Slow(Dataset):
    def __len__(self):
        return 100
    def __getitem__(self, index):
        time.sleep(index)
        return index

loader = DataLoader(Slow(), num_workers=2, worker_init_fn=start_worker, multiprocessing_context=worker_context())
batches = iter(loader)
next(batches)
raise SystemExit("error: a user error")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are not forked there")
def test_workers_that_end_with_the_run_are_not_called_failed() -> None:
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", ENDS_LOADER], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 1 and done.stderr == "error: a user error\n"
