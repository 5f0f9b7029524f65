"""The Lightning strategy that the options ask for."""

import torch
from lightning.pytorch.strategies import Strategy

from training.distributed.config import DataParallelStrategy, OneDevice, ParallelConfig
from training.distributed.zero import ZeroStrategy


def build_strategy(config: ParallelConfig, *, processes: int, device: torch.device) -> Strategy:
    """The strategy for a run of `processes` ranks; device: of a single process."""
    if config.zero_stage:
        return ZeroStrategy(config, device.type)
    return OneDevice(device) if processes == 1 else DataParallelStrategy(config)
