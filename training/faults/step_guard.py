"""Steps that go wrong: skipped by all ranks alike, counted, and a stop with a dump when there are too many."""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from common.checks import check_number
from training.distributed.checkpoint_state import not_finite
from training.distributed.engine import Engine
from training.faults.failures import MicroBatch, write_dump
from training.faults.interruption import Interruption, stop
from training.tracking import say


@dataclass
class GuardConfig:
    """Which optimizer steps are skipped: their gradients are discarded, weights and optimizer state stay as they are.

    The spike rule is that of OLMo-core's SkipStepOptimizer for losses, which uses 6 deviations and 128 steps (PaLM,
    arXiv 2204.02311, section 5.1, skipped batches around spikes by hand). It supposes that the loss of one global
    batch is a good estimate, so it is off unless asked for: with few sequences a step, an odd document is a spike too.

    Args:
        skip_nonfinite: skip a step whose loss or gradient norm is not finite on any rank.
        spike_deviations: skip a step whose loss lies more than this many standard deviations above the mean of the
            last `window` steps; null for never.
        window: steps that are looked back on. The spike rule needs half of them.
        max_skipped: steps among the last `window` that may be skipped; one more stops the run with a dump in
            RUN/failures.
    """

    skip_nonfinite: bool = True
    spike_deviations: float | None = None
    window: int = 128
    max_skipped: int = 10

    def __post_init__(self) -> None:
        check_number("guard.spike_deviations", self.spike_deviations, above=0, null="never")
        check_number("guard.window", self.window, least=4, most=10**6, whole=True)
        if not 0 <= self.max_skipped < self.window:
            raise ValueError(
                f"guard.max_skipped is {self.max_skipped}: expected at least 0 and less than guard.window {self.window}"
            )


@dataclass(frozen=True)
class StepOutcome:
    """An optimizer step as all ranks know it: loss in nats, labelled tokens, z-loss and divergence from a teacher,
    summed over all ranks; what layers learn from besides, summed over layers, a token."""

    loss_sum: float = 0.0
    valid_tokens: float = 0.0
    gradient_norm: float = 0.0
    z_loss_sum: float = 0.0
    kl_sum: float = 0.0
    auxiliary: float = 0.0

    @property
    def loss(self) -> float:
        return self.loss_sum / max(1.0, self.valid_tokens)

    @property
    def not_finite(self) -> str:
        """The first part of what is trained on that is not finite, with its value; empty where all are."""
        parts = {
            "loss": self.loss,
            "z-loss": self.z_loss_sum,
            "divergence from the teacher": self.kl_sum,
            "auxiliary loss": self.auxiliary,
        }
        return next((f"{name} is {value}" for name, value in parts.items() if not math.isfinite(value)), "")


class History:
    """What the rules look back on; part of the checkpoint, so that a resumed run decides as an undisturbed one.

    Args:
        window: steps that are remembered.
        losses: finite losses of the last steps; of skipped ones too, so that a lasting change of level soon passes.
        skipped: for each of the last steps, whether it was skipped.
        total: skipped steps since the start of the run.
    """

    def __init__(self, window: int, losses: Iterable[float] = (), skipped: Iterable[bool] = (), total: int = 0) -> None:
        self.window, self.total = window, total
        self.losses, self.skipped = deque(losses, maxlen=window), deque(skipped, maxlen=window)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "skipped": list(self.skipped), "total": self.total}

    def spike(self, loss: float) -> float:
        """Standard deviations by which a loss lies above the mean of the last losses; 0 while there are few."""
        count = len(self.losses)
        if count < self.window // 2:
            return 0.0
        mean = math.fsum(self.losses) / count
        deviation = math.sqrt(math.fsum((other - mean) ** 2 for other in self.losses) / count)
        return (loss - mean) / deviation if deviation else 0.0


class StepGuard(Callback):
    """Looks at every optimizer step before it is taken.

    One all-reduce of seven numbers and one read by the host a step decide for all ranks: the loss that is logged,
    whether the step is skipped, and whether a rank has been told to stop. The read waits for the backward pass; its
    cost is that the optimizer's few kernels are launched after it and not while the device is still busy.

    Args:
        config: the rules.
        interruption: whose flag the ranks agree on.
        run_dir: gets failures/step-XXXXXXXX when the guard gives up.
        code_version: recorded there.

    Attributes:
        gave_up: the run ends, because too many steps were skipped or because of what is `lost`.
        lost: in words, what of the weights or the optimizer's state is not finite, and since when; never saved.
    """

    def __init__(self, config: GuardConfig, interruption: Interruption, run_dir: Path, code_version: str) -> None:
        self.config, self.interruption, self.run_dir, self.code_version = config, interruption, run_dir, code_version
        self.history = History(config.window)
        self.micro_batches: list[MicroBatch] = []  # of the current step
        self.outcome = StepOutcome()  # of the last step
        self.skipped = self.gave_up = False
        self.lost = ""
        self._suspect = False  # a step that is not finite has been taken
        self.folder = run_dir / "failures"  # of the dump, once there is one

    def state_dict(self) -> dict[str, Any]:
        return self.history.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = History(self.config.window, **state_dict)

    def observe(
        self,
        loss_sum: Tensor,
        valid_tokens: int,
        sample_ids: list[int],
        z_loss_sum: Tensor,
        kl_sum: Tensor,
        auxiliary: Tensor,
    ) -> None:
        """Take note of a micro-batch of this rank: its summed loss (scalar), labelled tokens and global samples, its
        summed z-loss and divergence from a teacher (scalars), and what layers learn from besides, a token (scalar)."""
        scalars = loss_sum.detach(), z_loss_sum.detach(), kl_sum.detach(), auxiliary.detach()
        self.micro_batches.append(MicroBatch(sample_ids, scalars[0], valid_tokens, *scalars[1:]))

    def admits(self, trainer: Trainer, engine: Engine, norm: Tensor) -> bool:
        """Whether the step is to be taken. To be called by all ranks, after the last backward pass of each step.

        Args:
            norm: gradient norm from engine.gradient_norm (scalar).
        """
        bad_norm = self._reduce(trainer, norm)
        objection, finite = self._objection(bad_norm), not (self.outcome.not_finite or bad_norm)
        self.skipped = bool(objection)
        self._suspect = not (finite or self.skipped)
        self.history.skipped.append(self.skipped)
        if math.isfinite(self.outcome.loss):
            self.history.losses.append(self.outcome.loss)
        if self.skipped:
            self.history.total += 1
            step, recent = trainer.global_step + 1, sum(self.history.skipped)
            say(f"step {step}: skipped, {objection} ({recent} of the last {len(self.history.skipped)} steps skipped)")
            if self.find_lost(trainer, only_if=not finite):
                self._give_up(trainer, engine, f"{objection}, and {self.lost}")
            elif recent > self.config.max_skipped:
                self._give_up(trainer, engine, objection)
        self.micro_batches.clear()
        return not self.skipped

    def find_lost(self, trainer: Trainer, *, only_if: bool = True) -> str:
        """Set `lost`, and end the run where it is not empty. To be called by all ranks."""
        if only_if and not self.lost and (key := not_finite(trainer.strategy.training_state())):  # type: ignore[attr-defined]
            self.lost = f"{key} is not finite after step {trainer.global_step}"
        self.gave_up |= bool(self.lost)
        return self.lost

    def _reduce(self, trainer: Trainer, norm: Tensor) -> bool:
        """Set the outcome of the step from all ranks; whether any of them has a gradient norm that is not finite."""
        device = trainer.strategy.root_device
        norm = norm.detach().to(device, torch.float64)
        each = [
            torch.stack([micro.loss_sum, micro.z_loss_sum, micro.kl_sum, micro.auxiliary])
            for micro in self.micro_batches
        ]
        loss_sums = torch.stack(each).to(torch.float64).sum(dim=0)  # (4,)
        valid_tokens = sum(micro.valid_tokens for micro in self.micro_batches)
        counts = torch.tensor([valid_tokens, self.interruption.requested], dtype=torch.float64, device=device)
        local = torch.cat([loss_sums, (~norm.isfinite()).double()[None], counts])
        totals = trainer.strategy.reduce(local, reduce_op="sum")
        loss_sum, z_sum, kl_sum, auxiliary, bad_norms, all_valid, requests, own_norm = torch.cat(
            [totals, norm[None]]
        ).tolist()
        auxiliary /= len(self.micro_batches) * trainer.world_size
        self.outcome = StepOutcome(loss_sum, all_valid, own_norm, z_sum, kl_sum, auxiliary)
        self.interruption.agreed |= requests > 0
        return bad_norms > 0

    def _objection(self, bad_norm: bool) -> str:
        """Why the step must be skipped; empty where it need not."""
        loss, limit = self.outcome.loss, self.config.spike_deviations
        if self.config.skip_nonfinite:
            if self.outcome.not_finite:
                return f"its {self.outcome.not_finite}"
            if bad_norm:
                return f"its gradient norm is {self.outcome.gradient_norm}"
        if limit is not None and (deviations := self.history.spike(loss)) > limit:
            return f"its loss {loss:.4f} is {deviations:.1f} standard deviations above the mean of the last steps"
        return ""

    def _give_up(self, trainer: Trainer, engine: Engine, objection: str) -> None:
        self.gave_up = True
        self.folder = self.run_dir / "failures" / f"step-{trainer.global_step + 1:08d}"
        step = {
            "step": trainer.global_step + 1,
            "reason": objection,
            "loss": self.outcome.loss,
            "gradient_norm": self.outcome.gradient_norm,
            "last_losses": list(self.history.losses),
            "last_skipped": [int(skipped) for skipped in self.history.skipped],
            "code_version": self.code_version,
        }
        write_dump(self.folder, trainer, engine, step, self.micro_batches)
        # whoever resumes from here has decided to go on behind these batches
        self.history.skipped.clear()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._suspect:
            self._suspect = False
            self.find_lost(trainer)
        if self.gave_up:
            stop(trainer)
