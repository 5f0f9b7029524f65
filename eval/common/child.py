"""A command as a child of this process that gets its signals and does not outlive it.

    python eval/common/child.py PARENT PROGRAM [ARGUMENT ...]

is what `run` starts: it binds itself to the process PARENT and becomes PROGRAM.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def run(command: Sequence[str]) -> tuple[int, signal.Signals | None]:
    """Runs a command to its end: its exit code (minus the signal that killed it), and the last of FORWARDED that this
    process was sent meanwhile.

    The child is in a process group of its own: Ctrl-C of a terminal goes to all processes of the group in front, and
    would reach it twice. Signals go to it alone, stops (Ctrl-Z) to its group; a signal that is ignored here, as shells
    have SIGINT for commands in the background, is ignored there. However this process ends, SIGTERM follows for the
    child. Call it from the main thread.
    """
    received: list[signal.Signals] = []
    child: subprocess.Popen[bytes] | None = None

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        if child is not None:
            child.send_signal(number)

    def suspend(number: int, frame: FrameType | None) -> None:
        if child is not None:
            os.killpg(child.pid, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)  # goes on from here when it is continued
        if child is not None:
            os.killpg(child.pid, signal.SIGCONT)

    handlers: dict[signal.Signals, Any] = {**dict.fromkeys(FORWARDED, forward), signal.SIGTSTP: suspend}
    before = {number: signal.getsignal(number) for number in handlers}
    try:
        for number, handler in handlers.items():
            if before[number] != signal.SIG_IGN:
                signal.signal(number, handler)
        child = subprocess.Popen([sys.executable, "-P", __file__, str(os.getpid()), *command], process_group=0)
        for number in received:  # came before there was a child
            child.send_signal(number)
        return child.wait(), received[-1] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def bind(parent: int) -> None:
    """SIGTERM for this process when its parent ends, which must be `parent`; kept over exec."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it has ended before
        sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    bind(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
