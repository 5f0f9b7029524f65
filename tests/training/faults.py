"""Callbacks that kill their own training process, named by class_path in the tests' configs."""

import os
import signal
from typing import Any, Literal

from lightning.pytorch import Callback

import training.checkpointing


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillAfterStep(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            die()


class KillDuringSave(Callback):
    """stage "write": nothing but the folder exists yet; "mark": the files are written, the marker is not."""

    def __init__(self, step: int, stage: Literal["write", "mark"]) -> None:
        self.step, self.stage = step, stage

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.global_step == self.step:
            if self.stage == "write":
                die()
            training.checkpointing.write_complete = die  # type: ignore[assignment]
