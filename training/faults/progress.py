"""What a process is doing and since when: noted by the main thread, read by threads that wait for it."""

import time
from collections.abc import Callable
from typing import NamedTuple


class State(NamedTuple):
    """Activity, optimizer steps of the run so far (None before training), and when it began (time.monotonic)."""

    activity: str
    step: int | None
    since: float


class Progress:
    """The last note is the state; one assignment, so that a reader always sees a whole one.

    The watchdog has it as its attribute `progress`: a callback that takes long between two batches notes each part that
    is done there, or it is taken for hanging (eval/held_out/callback.py does).

    Attributes:
        start_step: optimizer steps of the run before this session; None before training begins.
        stepped: an optimizer step of this session has ended.
        writing: whether a thread of this process is writing a checkpoint, beside the activity.
    """

    def __init__(self) -> None:
        self.start_step: int | None = None
        self.stepped = False
        self.writing: Callable[[], bool] = lambda: False
        self.note("starting", None)

    def note(self, activity: str, step: int | None) -> None:
        """Something has been done; `activity` is what comes next."""
        self.state = State(activity, step, time.monotonic())

    def __str__(self) -> str:
        """The activity with its time, as in "validating, 1:20"."""
        activity, step, since = self.state
        if activity == "training" and not self.stepped:
            activity = "compiling and running the first optimizer step"
        elif activity == "training":
            activity = f"in optimizer step {(step or 0) + 1}"
        return f"{activity}, {minutes(time.monotonic() - since)}"


def minutes(seconds: float) -> str:
    """80 -> "1:20"."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
