"""What a training step needs to know of where gradients live: in the parameters, or in an engine of its own."""

from typing import Any, Protocol, cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn


class Engine(Protocol):
    """Gradients of the current optimizer step, after they have been accumulated and reduced over all ranks."""

    def gradient_norm(self) -> Tensor:
        """L2 norm of all gradients (scalar, the same on all ranks, no host synchronisation), before clipping."""

    def clip_gradients(self, max_norm: float, norm: Tensor) -> None:
        """Scale all gradients by min(1, max_norm / norm), with `norm` from gradient_norm."""

    def discard_gradients(self) -> None:
        """Let the optimizer step that follows change neither weights nor optimizer state."""

    def gradient_norms(self) -> dict[str, Tensor]:
        """L2 norm of each parameter's gradient by the parameter's name (scalars); called by all ranks. For dumps."""


class PlainEngine:
    """Gradients in the parameters: one device, or DDP."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.parameters = list(module.parameters())  # walking the modules at every step takes the host long

    def gradient_norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def clip_gradients(self, max_norm: float, norm: Tensor) -> None:
        torch.nn.utils.clip_grads_with_norm_(self.parameters, max_norm, norm)

    def discard_gradients(self) -> None:
        # torch's optimizers pass over parameters without a gradient
        for parameter in self.parameters:
            parameter.grad = None

    def gradient_norms(self) -> dict[str, Tensor]:
        return {name: p.grad.norm() for name, p in self.module.named_parameters() if p.grad is not None}


def engine_of(trainer: Trainer) -> Engine:
    """The engine behind the trainer's strategy."""
    return cast(Any, trainer.strategy).engine()
