"""How a training session ended: its exit code (common/exits.py) and the line that says why."""

import math
from pathlib import Path

from lightning.pytorch import Trainer

from common.exits import DIVERGED, INTERRUPTED
from model.checkpoint import list_checkpoints
from training.faults.interruption import Interruption
from training.faults.step_guard import StepGuard
from training.tracking import say


def exit_code(trainer: Trainer, guard: StepGuard, interruption: Interruption, run_dir: Path) -> int:
    """Also says how the session ended, unless it is the run's end. Only rank 0 reports it: Lightning's launcher and
    srun take a code that is not 0 for a crash and kill the other ranks, which are ending anyway."""
    code = 0
    if guard.lost:
        code, newest = DIVERGED, list_checkpoints(run_dir).newest
        say(
            f"error: {guard.lost}, so that it was not saved: the newest checkpoint is "
            f"{newest.path if newest else 'none'}; the same settings would lead there again: choose others, such "
            f"as a smaller model.optimizer.lr (exit code {code})"
        )
    elif guard.gave_up:
        code = DIVERGED
        say(
            f"stopped at step {trainer.global_step}: more than guard.max_skipped = {guard.config.max_skipped} "
            f"of the last {guard.config.window} steps went wrong. What reproduces the last one is in "
            f"{guard.folder}; --resume auto goes on behind it (exit code {code})"
        )
    elif interruption.agreed and trainer.global_step < trainer.max_steps:
        interruption.signals.ignore()
        code = INTERRUPTED
        say(
            f"stopped by {interruption.reason} at step {trainer.global_step}, which is saved: the same "
            f"command with --resume auto continues (exit code {code})"
        )
    elif not math.isfinite(loss := guard.outcome.loss):
        code = DIVERGED
        say(
            f"error: the loss of the last step, {trainer.global_step}, is {loss}, so that its gradients were "
            f"discarded: what is saved is what was there before it, and is not to be trusted (exit code {code})"
        )
    return code if trainer.is_global_zero else 0
