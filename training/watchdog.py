"""A process that gets nothing done ends, with a message, in bounded time: the scheduler then starts the run again."""

import faulthandler
import os
import signal
import threading
import time
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from common.exits import STALLED

# In the environment of ranks that Lightning starts: the process that starts them, which is rank 0 of the machine.
LAUNCHER = "LONGSPLASH_LAUNCHER_PID"
REPORT_SECONDS = 4.0  # for the watchdogs of other ranks, which are due at about the same time


@dataclass
class WatchdogConfig:
    """When a process that makes no progress is ended. Progress is a batch, trained or validated, or a save.

    The default lies below the 30 minutes after which torch's process groups abort without saying what hung.

    Args:
        minutes: without progress until the process is ended; 0 for never.
        first_minutes: the same before the first optimizer step, which compiles kernels and fills caches.
    """

    minutes: float = 20.0
    first_minutes: float = 60.0

    def __post_init__(self) -> None:
        if self.minutes < 0:
            raise ValueError(f"watchdog.minutes is {self.minutes}: expected 0 (never) or more")
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

    def __init__(self, config: WatchdogConfig) -> None:
        self.config = config
        self.start_step: int | None = None
        if os.environ.get("LOCAL_RANK", "0") == "0":
            os.environ[LAUNCHER] = str(os.getpid())
        # The process of rank 0, in ranks that Lightning has started from it.
        self._parent = os.getppid() if os.environ.get(LAUNCHER) == str(os.getppid()) else None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if not self.config.minutes or self._thread:
            return
        self.trainer = trainer
        self._note("setting up", None)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def _note(self, activity: str, step: int | None) -> None:
        """Something has been done; `activity` is what comes next."""
        minutes = self.config.first_minutes if step in (None, self.start_step) else self.config.minutes
        self.state = (activity, step or 0, minutes, time.monotonic())  # one assignment, so that the thread sees a whole

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.start_step = trainer.global_step
        self._note("waiting for a batch", trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._note("training", trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._note("between batches", trainer.global_step)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._note("saving", trainer.global_step)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._note("validating", trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(1.0):
            activity, step, minutes, since = self.state
            if time.monotonic() - since > 60 * minutes:
                self._report(f"no progress for {minutes:g} minutes while {activity} after optimizer step {step}")
                self._end_local_ranks()
                os._exit(STALLED)
            if self._parent is not None and os.getppid() != self._parent:
                self._report(f"the process of rank 0 is gone; ending while {activity} after optimizer step {step}")
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
        launcher = self.trainer.strategy.launcher
        if self._parent is not None:
            time.sleep(2 * REPORT_SECONDS)  # rank 0 first: its exit code is the run's
            if os.getppid() == self._parent:
                os.kill(self._parent, signal.SIGKILL)
        elif isinstance(launcher, _SubprocessScriptLauncher) and launcher.procs:
            time.sleep(REPORT_SECONDS)
            launcher.kill(signal.SIGKILL)
