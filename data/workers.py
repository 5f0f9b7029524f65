"""Loader processes that outlive neither their run nor an error in it."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.context import BaseContext, ForkContext, ForkProcess
from multiprocessing.popen_fork import Popen
from typing import Any

PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class _KilledPopen(Popen):
    def terminate(self) -> None:
        """multiprocessing ends what is left of a process's children by SIGTERM and waits for them without a limit: a
        worker that has SIGTERM ignored would keep the whole run from ending. torch's handler of SIGCHLD would call a
        worker that is ended here a failed one, in a traceback after the run's own last line."""
        if threading.current_thread() is not threading.main_thread():
            self.kill()  # handlers are the main thread's to set
            return
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.kill()
        self.wait()
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


class _WorkerProcess(ForkProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Popen:
        return _KilledPopen(process_obj)


class _WorkerContext(ForkContext):
    Process = _WorkerProcess


def worker_context() -> BaseContext | None:
    """For a DataLoader: processes that are ended by SIGKILL; None where processes are not forked."""
    return _WorkerContext() if sys.platform == "linux" else None


def start_worker(worker: int) -> None:
    """In a new worker: signals that ask a run to stop reach all of its processes, and its workers go on while it saves.
    They end when it tells them to, and at once when it is gone, however it went."""
    for signum in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        run = multiprocessing.parent_process()
        if run is None or os.getppid() != run.pid:  # it went before the request was in place
            os._exit(1)
