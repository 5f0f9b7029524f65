"""A torch profiler trace of a few optimizer steps."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.profiler import ProfilerActivity, profile

from common.checks import check_numbers
from training.throughput import StepClock
from training.tracking import say, session_name


@dataclass
class ProfileConfig:
    """A trace of a few steps, to be opened in https://ui.perfetto.dev or chrome://tracing.

    Args:
        steps: optimizer steps to trace; 0 for none. Each adds megabytes to the file.
        start: optimizer steps of the session that pass before, so that compilation stays out of the trace.
        rank: the process that is traced.
    """

    steps: int = 0
    start: int = 5
    rank: int = 0

    def __post_init__(self) -> None:
        check_numbers("profile.", self, ("steps", "start", "rank"), least=0, whole=True)


class StepProfiler(Callback):
    """Writes RUN/profile/step-XXXXXXXX.rank-N.json.gz, named after the optimizer steps before the trace.

    Args:
        config: what to trace.
        run_dir: the run folder.
        clock: paused while the trace is started and written.
    """

    def __init__(self, config: ProfileConfig, run_dir: Path, clock: StepClock) -> None:
        self.config, self.folder, self.clock = config, run_dir / "profile", clock
        self.profiler: profile | None = None
        self.written = False

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self.config.rank >= trainer.world_size:
            raise ValueError(f"profile.rank is {self.config.rank}: expected one of the {trainer.world_size} ranks")
        self.first = trainer.global_step + self.config.start

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        due = self.config.steps and trainer.global_step == self.first and self.profiler is None
        if due and trainer.global_rank == self.config.rank:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self.profiler = profile(activities=activities, record_shapes=True)
            with self.clock.paused():
                self.profiler.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.first + self.config.steps:
            self._close()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._close()  # a session that ends earlier
        if self.config.steps and not self.written:
            say(
                f"profile.steps is {self.config.steps}, but nothing was traced: the session ended at step "
                f"{trainer.global_step}, before step {self.first} of profile.start {self.config.start}"
            )

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self.profiler is None:
            return
        profiler, self.profiler, self.written = self.profiler, None, True
        path = self.folder / f"{session_name(self.first)}.rank-{self.config.rank}.json.gz"
        with self.clock.paused():
            profiler.stop()
            self.folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(path))
