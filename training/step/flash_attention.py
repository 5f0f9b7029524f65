"""FlashAttention-4 for the steps of a run, on all of its ranks or none."""

import sys
from collections.abc import Sequence

import torch
from lightning.pytorch.strategies import Strategy
from tqdm import tqdm

from model.config import ModelConfig
from model.flash_attention import INSTEAD, PACKAGE, activate, deactivate, is_active
from training.tracking import say


def take_flash_attention(
    strategy: Strategy, configs: Sequence[ModelConfig], dtype: torch.dtype | None, ranks: int, compiled: bool
) -> None:
    """Arguments as of model.flash_attention.activate. A collective call; each rank that cannot use it says why."""
    told = activate(configs, strategy.root_device, dtype, ranks, compiled)
    here, everywhere = is_active(), strategy.reduce_boolean_decision(is_active(), all=True)
    if not everywhere:
        deactivate()
    if here and not everywhere:
        told = f"{PACKAGE} cannot be used on another rank: {INSTEAD}"
    if told is None:
        return
    if here or strategy.is_global_zero:
        say(told)
    else:
        tqdm.write(f"rank {strategy.global_rank}: {told}", file=sys.stderr)  # type: ignore[attr-defined]
