"""A process that gets nothing done ends, with a message, in bounded time: the scheduler then starts the run again."""

import faulthandler
import os
import signal
import threading
import time
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, Trainer

from common.checks import check_number
from common.exits import STALLED
from training.faults.progress import Progress
from training.faults.signals import LocalRanks

REPORT_SECONDS = 4.0  # for the watchdogs of other ranks, which are due at about the same time


@dataclass
class WatchdogConfig:
    """When a process that makes no progress is ended. Progress is a batch, trained or validated, a context of an
    evaluation, or a save.

    The default lies below the 30 minutes after which torch's process groups abort without saying what hung.

    Args:
        minutes: without progress until the process is ended; 0 for never.
        first_minutes: the same before the first optimizer step, which compiles kernels and fills caches.
    """

    minutes: float = 20.0
    first_minutes: float = 60.0

    def __post_init__(self) -> None:
        check_number("watchdog.minutes", self.minutes, least=0, zero="never")
        check_number("watchdog.first_minutes", self.first_minutes)
        if self.first_minutes < self.minutes:
            raise ValueError(
                f"watchdog.first_minutes is {self.first_minutes}: expected at least watchdog.minutes {self.minutes}"
            )


class Watchdog(Callback):
    """A thread that ends this process with exit code STALLED, every Python stack on stderr, when it stops progressing.

    Every rank has its own. A collective stalls all of its ranks, so that the stack of each tells where it waits, and
    the one that is elsewhere is at fault. srun --kill-on-bad-exit and torchrun end the ranks that are left; where
    Lightning has started them itself, this thread does.
    """

    def __init__(self, config: WatchdogConfig, progress: Progress, ranks: LocalRanks) -> None:
        self.config, self.progress, self.ranks = config, progress, ranks
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.progress.note("setting up", None)
        if not self.config.minutes or self._thread:
            return
        self.trainer = trainer
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.progress.start_step = trainer.global_step
        self.progress.note("waiting for a batch", trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.progress.note("training", trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.progress.note("between batches", trainer.global_step)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.progress.note("saving", trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.progress.note("validating", trainer.global_step)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.progress.note("validating", trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(1.0):
            activity, step, since = self.progress.state
            first = step in (None, self.progress.start_step)
            minutes = self.config.first_minutes if first else self.config.minutes
            if time.monotonic() - since > 60 * minutes:
                self._report(f"no progress for {minutes:g} minutes while {activity} after optimizer step {step or 0}")
                self._end_local_ranks()
                os._exit(STALLED)
            if self.ranks.parent is not None and os.getppid() != self.ranks.parent:
                self._report(f"the process of rank 0 is gone; ending while {activity} after optimizer step {step or 0}")
                os._exit(STALLED)

    def _report(self, what: str) -> None:
        """Straight to the file descriptor: a lock of sys.stderr may be held by whoever hangs."""
        trainer = self.trainer
        message = (
            f"\nwatchdog: rank {trainer.global_rank} of {trainer.world_size}: {what}; last samples "
            f"{trainer.lightning_module.sample_ids}. Python stacks follow, then exit code {STALLED}; --resume auto "
            "continues from the newest checkpoint.\n"
        )
        with open(os.memfd_create("stacks"), "rb+") as stacks:  # one write, or the ranks' lines would mix
            faulthandler.dump_traceback(file=stacks, all_threads=True)
            stacks.seek(0)
            os.write(2, message.encode() + stacks.read())

    def _end_local_ranks(self) -> None:
        """End what Lightning has started besides this process, once the others have had time to report.

        SIGKILL, because a stopped process takes no other signal.
        """
        if self.ranks.parent is not None:
            time.sleep(2 * REPORT_SECONDS)  # rank 0 first: its exit code is the run's
            if os.getppid() == self.ranks.parent:
                os.kill(self.ranks.parent, signal.SIGKILL)
        elif getattr(self.ranks.launcher, "procs", []):
            time.sleep(REPORT_SECONDS)
            self.ranks.signal_children(signal.SIGKILL)
