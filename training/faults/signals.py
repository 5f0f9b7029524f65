"""Signals that ask a process to stop, noticed whatever its main thread is doing."""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from common.exits import INTERRUPTED, KEYBOARD
from training.faults.progress import Progress, minutes

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
SAY_SECONDS = 20.0  # between lines about what is being waited for
# In the environment of ranks that Lightning starts: the process that starts them, which is rank 0 of the machine.
LAUNCHER = "LONGSPLASH_LAUNCHER_PID"


class LocalRanks:
    """The processes of one machine where Lightning has started them itself: rank 0's children are the others.

    Attributes:
        parent: the process of rank 0, in the others; else None.
        launcher: Lightning's, in rank 0, once it is known.
    """

    def __init__(self) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            os.environ[LAUNCHER] = str(os.getpid())
        self.parent = os.getppid() if os.environ.get(LAUNCHER) == str(os.getppid()) else None
        self.launcher: Any = None

    def signal_children(self, signum: int) -> None:
        for process in getattr(self.launcher, "procs", []):
            process.send_signal(signum)  # passes over one that has ended


class StopSignals:
    """SIGUSR1, SIGTERM and Ctrl-C. A process whose step can be waited for is given time to end it and save; one that
    has nothing new to save ends at once, and one whose step does not end in time then, both with exit code INTERRUPTED.

    A Python handler runs between two bytecodes only, which may be minutes apart (compilers, collectives), so a thread
    does all this: the interpreter's C handler writes to a pipe that it reads. A second Ctrl-C ends at once, without
    saving. Where Ctrl-C is ignored, as shells have it for commands in the background, it stays ignored. Where Lightning
    has started the ranks of a machine, a signal to one of them reaches all, and rank 0 ends the others.

    Args:
        progress: what the process is doing.
        ranks: of this machine.

    Attributes:
        requested: this process has been told to stop.
        grace: seconds for the step that is running.
        saving: no longer to be ended: all ranks have agreed to stop and are saving, or training is over.
    """

    def __init__(self, progress: Progress, ranks: LocalRanks) -> None:
        self.progress, self.ranks = progress, ranks
        self.requested = self.saving = False
        self.grace: Callable[[], float] = lambda: 0.0
        self.name, self.since, self._said, self._interrupts = "a signal", 0.0, 0.0, 0
        self._closed = threading.Event()

    def install(self) -> None:
        """From now on; in the main thread."""
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._handlers = {
            signum: signal.signal(signum, self._handle)
            for signum in STOP_SIGNALS
            if signum != signal.SIGINT or signal.getsignal(signum) != signal.SIG_IGN
        }
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Handlers as before, but for signals that are ignored by now (`ignore`)."""
        self._closed.set()
        signal.set_wakeup_fd(self._wakeup)
        for signum, handler in self._handlers.items():
            if signal.getsignal(signum) == self._handle:
                signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def ignore(self) -> None:
        """For a process that is ending by itself: records are still being flushed, and the exit code says something."""
        self.saving = True
        for signum in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True  # the thread sees to the rest

    def _watch(self) -> None:
        while not self._closed.is_set():
            if select.select([self._read], [], [], 0.2 if self.requested else None)[0]:
                for signum in os.read(self._read, 64):
                    if signum in STOP_SIGNALS:
                        self._note(signum)
            if self.since and not self.saving and not self._closed.is_set():
                self._wait()

    def _note(self, signum: int) -> None:
        self._interrupts += signum == signal.SIGINT
        if self._interrupts > 1 and self.ranks.parent is None:
            self._end("stopped by a second Ctrl-C, without saving", KEYBOARD)
        if self.since:
            return
        self.requested, self.since, self.name = True, time.monotonic(), signal.Signals(signum).name
        try:
            if self.ranks.parent is not None and os.getppid() == self.ranks.parent:
                os.kill(self.ranks.parent, signal.SIGTERM)
            elif self.progress.stepped:
                self.ranks.signal_children(signal.SIGTERM)
        except ProcessLookupError:
            pass  # it has ended meanwhile

    def _wait(self) -> None:
        """Called often while the process has been told to stop: say what is waited for, and end it when time is up."""
        if self.ranks.parent is not None:
            if os.getppid() != self.ranks.parent:
                os._exit(INTERRUPTED)  # it has ended before it knew this one
            return  # rank 0 decides
        progress, waited = self.progress, time.monotonic() - self.since
        if not progress.stepped:
            self._end(
                f"stopped by {self.name} while {progress}: nothing new to save; the same command with --resume auto "
                f"starts again (exit code {INTERRUPTED})",
                INTERRUPTED,
            )
        grace = self.grace()
        if waited > grace and progress.state.activity != "saving" and not progress.writing():
            self._end(
                f"stopped by {self.name} without saving: {progress}, has not ended within {grace:g} seconds "
                "(interruption.grace_seconds); the same command with --resume auto continues from the newest "
                f"checkpoint (exit code {INTERRUPTED})",
                INTERRUPTED,
            )
        if not self._said or time.monotonic() - self._said > SAY_SECONDS:
            first = not self._said
            self._said = time.monotonic()
            again = "; Ctrl-C again stops at once, without saving" * (first and self._interrupts > 0)
            say_directly(
                f"told to stop by {self.name}: waiting for the optimizer step to end, {minutes(waited)} of at most "
                f"{minutes(grace)} ({progress}){again}"
            )

    def _end(self, message: str, code: int) -> None:
        say_directly(message)
        self.ranks.signal_children(signal.SIGKILL)
        os._exit(code)


def say_directly(message: str) -> None:
    """To the file descriptor: whoever hangs may hold a lock of sys.stderr. Rank 0's word is enough."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        os.write(2, f"\n{message}\n".encode())


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Around the whole of a command that trains."""
    stop = StopSignals(Progress(), LocalRanks())
    stop.install()
    try:
        yield stop
    finally:
        stop.close()
