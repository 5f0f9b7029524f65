"""Ctrl-C while a command is still importing what it needs, which takes seconds."""

import os
import signal
import threading
from types import FrameType

from common.exits import KEYBOARD


def end_on_ctrl_c() -> None:
    """From now on Ctrl-C ends this process with one line and KEYBOARD, until `raise_on_ctrl_c`: the first thing that
    a command does. A KeyboardInterrupt inside an import would be a traceback, or be taken for a failed import.

    Where Ctrl-C is ignored, as shells have it for commands in the background, it stays so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_on_ctrl_c() -> None:
    """Ctrl-C is a KeyboardInterrupt again, for whoever catches it; does nothing without `end_on_ctrl_c`."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"\nstopped by Ctrl-C\n")
    os._exit(KEYBOARD)  # nothing has been begun
