"""Stopping on a signal: the ranks agree at the next optimizer step, save, and end together."""

import os
import signal
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, Trainer

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class Interruption(Callback):
    """Turns SIGUSR1, SIGTERM and a first Ctrl-C into a stop after the current optimizer step.

    The handlers only set a flag: a save or a collective inside a handler would wait for ranks that are waiting for this
    one. The flag travels in the step guard's all-reduce, so one rank that was told to stop stops all of them at the
    same step. A second Ctrl-C stops at once, without saving. Where Ctrl-C is ignored, as shells have it for commands in
    the background, it stays ignored.

    Attributes:
        requested: this process has been told to stop.
        agreed: all ranks know that one of them has been told to stop.
    """

    def __init__(self) -> None:
        self.requested = self.agreed = False

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        # Not earlier: Lightning's own SIGTERM handler, which broadcasts, is in place by now and gets replaced. When
        # training ends, Lightning restores the handlers that it had found.
        self._keyboard = signal.getsignal(signal.SIGINT)
        for signum in STOP_SIGNALS:
            if signum != signal.SIGINT or self._keyboard != signal.SIG_IGN:
                signal.signal(signum, self._request)

    def _request(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, self._keyboard)
            os.write(2, b"\nstopping after this optimizer step; Ctrl-C again stops at once, without saving\n")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.agreed:
            stop(trainer)

    def ignore_signals(self) -> None:
        """For a process that is ending by itself: records are still being flushed, and the exit code says something."""
        for signum in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)


def stop(trainer: Trainer) -> None:
    """Let training end after the current optimizer step, with a checkpoint but without a validation."""
    trainer.should_stop = True
    trainer.limit_val_batches = 0  # type: ignore[attr-defined]  # Lightning would validate once more
