"""What can be said of a run's options before a model is built or data are read."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Timer

from common.errors import UsageError
from common.outputs import check_writable
from model.config import ModelConfig
from model.flops import matmul_parameters
from training.distributed.checkpoint_state import SAVED_BYTES
from training.options import named_gpus, on_cuda
from training.throughput import GIB
from training.tracking import is_first_process


def usable_folder(run_dir: str) -> Path:
    """The folder of --run_dir, which is not made yet: its lock does that, and removes what it made of a run that never
    began. Raises UsageError where nothing can be written there."""
    if not run_dir.strip():
        raise UsageError("--run_dir is empty: expected the run's folder")
    if is_first_process():  # others would remove its folder under its hands
        check_writable(Path(run_dir), "--run_dir")
    return Path(run_dir)


def check_runs_here(network: ModelConfig, device: torch.device) -> None:
    """Raises UsageError for a network that this machine cannot hold, or a backend that it cannot run."""
    if network.attention.backend == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UsageError(
            "model.network.attention.backend is 'triton', which needs CUDA: use auto or torch on a CPU, or set "
            "TRITON_INTERPRET=1 to interpret its kernels"
        )
    needed = 4 * _parameters(network)
    if needed > (there := _host_memory()):
        raise UsageError(
            f"model.network has about {needed // 4:,} parameters, {needed / GIB:,.0f} GiB in float32, and this machine "
            f"has {there / GIB:,.0f} GiB of memory, where every process builds it whole: choose smaller sizes"
        )


def check_copy_fits(network: ModelConfig, optimizer: str, nodes: int) -> None:
    """Raises UsageError where this machine cannot hold its part of what an asynchronous save copies."""
    moment = SAVED_BYTES // 3 if optimizer == "muon" else 0  # of nearly all parameters Muon keeps one less
    needed = (SAVED_BYTES - moment) * _parameters(network) / nodes
    if needed > (there := _host_memory()):
        raise UsageError(
            f"checkpoint.asynchronous is true: the copy of what is saved takes {needed / GIB:,.0f} GiB of each node, "
            f"and this one has {there / GIB:,.0f} GiB of memory: expected false, or more nodes"
        )


def _parameters(network: ModelConfig) -> int:
    """About how many, without building it."""
    return matmul_parameters(network) + (0 if network.tie_embeddings else network.vocab_size * network.d_model)


def _host_memory() -> int:
    """Bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def duration(max_time: Any) -> timedelta | None:
    """The time that trainer.max_time asks for: "DD:HH:MM:SS", a dict of timedelta's arguments, or a timedelta."""
    if max_time is None:
        return None
    if isinstance(max_time, Namespace):
        max_time = max_time.as_dict()
    try:
        time = timedelta(seconds=Timer(max_time)._duration or 0)
    except (MisconfigurationException, TypeError, ValueError, OverflowError):
        time = timedelta(0)
    if time <= timedelta(0):
        raise UsageError(
            f"trainer.max_time is {max_time!r}: expected a time, as in 00:12:00:00 (DD:HH:MM:SS) or {{hours: 12}}"
        )
    return time


def first_device(options: dict[str, Any]) -> torch.device:
    """The first device that Trainer options ask for on a node."""
    if on_cuda(options):
        return torch.device("cuda", (named_gpus(options["devices"]) or [0])[0])
    return torch.device("cpu")
