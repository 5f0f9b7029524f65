"""Stopping in time: the ranks agree at the next optimizer step, save, and end together."""

import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from common.checks import check_number
from training.faults.signals import StopSignals


@dataclass
class InterruptionConfig:
    """How long a run that is told to stop (SIGUSR1, SIGTERM, Ctrl-C) may take until it ends.

    Before the first optimizer step of a session has ended it ends at once: there is nothing new to save. Later the step
    that is running ends and is saved; evaluations and validations are cut short.

    Args:
        grace_seconds: for that step, or twice as long as the longest one of the session, if that is more; a process
            whose step has not ended by then ends without saving. The save itself is waited for. Slurm's lead
            (--signal in slurm/pretrain.sbatch) should be longer.
    """

    grace_seconds: float = 120.0

    def __post_init__(self) -> None:
        check_number("interruption.grace_seconds", self.grace_seconds, least=0)


class Interruption(Callback):
    """Turns a request to stop into a stop after the current optimizer step, with everything saved.

    Signals only set a flag: a save or a collective inside a handler would wait for ranks that are waiting for this one.
    The flag travels in the step guard's all-reduce, so one rank that was told to stop stops all of them at the same
    step.

    Args:
        config: how long it may take.
        signals: of this process.
        max_time: of training in this session, after which it stops as by a signal; None for no limit.

    Attributes:
        agreed: all ranks know that one of them has been told to stop.
        validation_is_cut: the same of the current validation, whose other batches are passed over.
    """

    def __init__(self, config: InterruptionConfig, signals: StopSignals, max_time: timedelta | None) -> None:
        self.config, self.signals, self.max_time = config, signals, max_time
        self.agreed = self.validation_is_cut = False
        self._deadline = float("inf")
        self._step, self._began, self._longest = 0, 0.0, 0.0
        signals.grace = lambda: max(config.grace_seconds, 2 * self._longest)

    @property
    def requested(self) -> bool:
        """This process has been told to stop, or its time is up."""
        return self.signals.requested or time.monotonic() > self._deadline

    @property
    def reason(self) -> str:
        """For the terminal."""
        return "a signal" if self.signals.requested or not self.max_time else f"trainer.max_time {self.max_time}"

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._step = trainer.global_step
        if self.max_time is not None:
            self._deadline = time.monotonic() + self.max_time.total_seconds()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._began = self._began or time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.agreed:
            self.signals.saving = True
            stop(trainer)
        if trainer.global_step > self._step:
            if self.signals.progress.stepped:  # the first one compiles
                self._longest = max(self._longest, time.monotonic() - self._began)
            self._step, self._began = trainer.global_step, 0.0
            self.signals.progress.stepped = True

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.signals.saving = True  # the last step is saved; what follows is cut short where it may be long

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.validation_is_cut = False

    def cuts_validation(self, trainer: Trainer) -> bool:
        """Whether any rank has been told to stop. Asked by all ranks for each batch: those that share weights or
        sequences have to run the same ones."""
        if not self.validation_is_cut:
            flag = torch.tensor(float(self.requested), device=trainer.strategy.root_device)
            self.validation_is_cut = bool(trainer.strategy.reduce(flag, reduce_op="sum") > 0)
        return self.validation_is_cut


def stop(trainer: Trainer) -> None:
    """Let training end after the current optimizer step, with a checkpoint but without a validation."""
    trainer.should_stop = True
    trainer.limit_val_batches = 0  # type: ignore[attr-defined]  # Lightning would validate once more
