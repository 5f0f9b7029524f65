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
    """Arguments as of model.flash_attention.activate. A collective call. The first rank says what is used; of others
    those that keep it from the rest say why."""
    told = activate(configs, strategy.root_device, dtype, ranks, compiled)
    here = is_active()
    everywhere, somewhere = (strategy.reduce_boolean_decision(here, all=every) for every in (True, False))
    if here and not everywhere:
        deactivate()
        told = f"{PACKAGE} cannot be used on another rank: {INSTEAD}"
    if told is None:
        return
    if strategy.is_global_zero:
        say(told)
    elif somewhere and not here:
        tqdm.write(f"rank {strategy.global_rank}: {told}", file=sys.stderr)  # type: ignore[attr-defined]
