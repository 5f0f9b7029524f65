"""What is needed to reproduce a step that went wrong, written under RUN/failures/step-XXXXXXXX."""

import json
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from training.distributed.engine import Engine

# torch names its build itself (+cu130)
LIBRARIES = ("triton", "lightning", "deepspeed", "liger-kernel", "torchao", "flash-attn-4")


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of this rank: global samples, summed loss in nats (scalar), labelled tokens; summed z-loss and
    divergence from a teacher in nats (scalars), which are not part of the loss; and what layers learn from besides, a
    token (scalar)."""

    sample_ids: list[int]
    loss_sum: Tensor
    valid_tokens: int
    z_loss_sum: Tensor
    kl_sum: Tensor
    auxiliary: Tensor


def write_dump(
    folder: Path, trainer: Trainer, engine: Engine, step: dict[str, Any], micro_batches: list[MicroBatch]
) -> None:
    """Write rank-XXXXX.json of every rank, and from rank 0 step.json and the session's config.yaml.

    To be called by all ranks while the gradients of the step are still there. step.json gets `step` and the gradient
    norm of every parameter and of every block, versions and devices. Numbers that are not finite are written as
    Python's json writes and reads them (NaN, Infinity).
    """
    norms = engine.gradient_norms()
    folder.mkdir(parents=True, exist_ok=True)
    batches = [
        {"sample_ids": micro.sample_ids, "loss_sum": float(micro.loss_sum), "valid_tokens": micro.valid_tokens}
        for micro in micro_batches
    ]
    _write(folder / f"rank-{trainer.global_rank:05d}.json", {"rank": trainer.global_rank, "micro_batches": batches})
    if trainer.is_global_zero:
        parameters = {name: float(norm) for name, norm in norms.items()}
        more = {"world_size": trainer.world_size, "precision": trainer.precision, "versions": versions()}
        gradients = {"gradient_norms_of_blocks": by_block(parameters), "gradient_norms": parameters}
        _write(folder / "step.json", {**step, **more, **gradients})
        shutil.copyfile(Path(trainer.default_root_dir) / "config.yaml", folder / "config.yaml")
    trainer.strategy.barrier("failure dump")


def by_block(norms: dict[str, float]) -> dict[str, float]:
    """Gradient norm of each block of layers (blocks.3) and of what stands outside of them."""
    squares: dict[str, float] = {}
    for name, norm in norms.items():
        parts = name.split(".")
        block = next((".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()), "other")
        squares[block] = squares.get(block, 0.0) + norm**2
    return {block: square**0.5 for block, square in squares.items()}


def versions() -> dict[str, str]:
    """Versions of Python, CUDA and the libraries that are installed, and the device."""
    installed = {distribution.name for distribution in distributions()}
    found = {library: version(library) for library in LIBRARIES if library in installed}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    python, cuda = platform.python_version(), str(torch.version.cuda)
    return {"python": python, "torch": torch.__version__, **found, "cuda": cuda, "device": device}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
