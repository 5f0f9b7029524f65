"""A device that fails under a run: out of memory, or an error of its driver."""

import socket
import sys
import traceback
from contextlib import suppress
from pathlib import Path

import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from tqdm import tqdm

from common.errors import error_line, out_of_memory
from common.exits import CRASHED
from model.checkpoint import list_checkpoints
from model.config import ModelConfig
from training.distributed.config import ParallelConfig
from training.distributed.sequence_parallel import check_sequence_parallel
from training.step.float8 import MULTIPLE

DEVICE_ERRORS = (torch.OutOfMemoryError, torch.AcceleratorError)
# model.activation_checkpointing -> the value with which less is kept on the device
LESS_KEPT = {"none": "full", "selective": "full", "full": "offload"}


def less_memory(settings: Namespace, network: ModelConfig) -> list[str]:
    """Options that make steps need less memory, which train.py would take.

    Args:
        settings: of train.py; model, data and parallel are read.
        network: that they describe.
    """
    model, size = settings.model, settings.data.micro_batch_size
    if model.cuda_graphs:  # which refuse recomputation, and smaller micro-batches of the same step
        return ["model.cuda_graphs false with model.activation_checkpointing full"]
    found = []
    if mode := LESS_KEPT.get(model.activation_checkpointing):
        found.append(f"model.activation_checkpointing {mode}")
    tokens = size * settings.data.sequence_length
    local = tokens // settings.parallel.sequence_parallel
    tile = min(model.mlp_tile_tokens or local, local)  # a larger one is none
    if tile > (1 if model.float8 == "none" else MULTIPLE):
        found.append(f"model.mlp_tile_tokens below {tile}")
    if size > 1:
        found.append(f"data.micro_batch_size below {size}")
    elif ranks := _more_ranks(settings.parallel.sequence_parallel, network, tokens):
        found.append(f"parallel.sequence_parallel {ranks} on as many devices")
    return found


def _more_ranks(now: int, network: ModelConfig, tokens: int) -> int | None:
    """The fewest ranks above `now` that can share a sequence; None where more cannot."""
    for ranks in range(now + 1, network.n_heads + 1):
        with suppress(ValueError):
            check_sequence_parallel(ParallelConfig(sequence_parallel=ranks), network, tokens, ranks)
            return ranks
    return None


def report_failure(error: BaseException, trainer: Trainer, less: list[str], run_dir: Path) -> int:
    """Says on stderr, from any rank, what has failed and how the run goes on, and returns the exit code. Out of memory
    is one line; another error's own traceback stands in front of it.

    Args:
        error: one of DEVICE_ERRORS. A device that has failed fails again while Lightning moves tensors away from it:
            shown are the errors that led here, up to the first one of a device.
        less: options that need less memory; none before there was a step, which needs no activations.
    """
    chain = _chain(error)
    place = next(i for i, found in enumerate(chain) if isinstance(found, DEVICE_ERRORS))
    first = chain[place]
    newest = list_checkpoints(run_dir).newest
    on = (
        f"the newest complete checkpoint is {newest.path}, from which --resume auto continues"
        if newest
        else "there is no checkpoint yet"
    )
    where = f"rank {trainer.global_rank} ({trainer.strategy.root_device} of {socket.gethostname()})"
    if memory := out_of_memory(first):
        named = " or ".join(filter(None, (", ".join(less[:-1]), *less[-1:])))
        what = (
            f"{where} is out of memory behind step {trainer.global_step}: {memory}; "
            f"{f'less is needed with {named}; ' if less else ''}python -m training.memory with the same options "
            "estimates it"
        )
    else:
        for found in chain[: place + 1]:
            traceback.print_exception(found, chain=False)
        what = (
            f"{where} failed behind step {trainer.global_step}: {error_line(chain[0]).split(' Search for ')[0]}; if it "
            "comes again at this step, CUDA_LAUNCH_BLOCKING=1 in front of the command shows where"
        )
    tqdm.write(f"error: {what}; {on}", file=sys.stderr)  # type: ignore[attr-defined]
    return CRASHED


def _chain(error: BaseException) -> list[BaseException]:
    """The errors that led to this one, the earliest first, and itself."""
    found = [error]
    while (before := found[0].__cause__ or found[0].__context__) is not None:
        found.insert(0, before)
    return found
