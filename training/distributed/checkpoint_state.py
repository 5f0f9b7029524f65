"""Weights and optimizer state by parameter name: which rank holds what, and how it gets to files and back.

The files (model/checkpoint.py) hold whole tensors and do not depend on who wrote them. Every rank writes the same
share of bytes; a rank that holds pieces of a tensor sends them to the rank that writes it, in rounds of bounded size.
A rank that reads maps the files into memory and copies its own pieces.
"""

import heapq
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from common.errors import error_line
from model.checkpoint import STATE_FILE, WEIGHT, Unreadable
from model.checksums import is_finite
from model.loading import StoredTensors
from training.step.muon import is_muon

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
MUON_MOMENTS: tuple[str, ...] = ("momentum_buffer",)
SAVED_BYTES = 4 * (1 + len(MOMENTS))  # of each parameter
FILE_BYTES = 4 * 2**30
# Elements that one writer receives in one round: 256 MiB of device memory.
ROUND_ELEMENTS = 2**26


class SaveError(Exception):
    """A checkpoint could not be written. Raised on all ranks when any of them fails."""


@dataclass(frozen=True)
class Fragment:
    """Elements start, start + 1, ... of the flattened tensor `key`; values (n,) is the memory that training uses."""

    key: str
    start: int
    values: Tensor


@dataclass(frozen=True)
class TrainingState:
    """What a rank holds of a run's weights and optimizer state.

    shapes: of all tensors of the run, in the same order on all ranks. replicated: every rank holds every tensor whole.
    steps: AdamW's steps taken, by parameter name; a rank that holds pieces knows those of its own parameters.
    """

    shapes: dict[str, tuple[int, ...]]
    fragments: list[Fragment]
    replicated: bool
    steps: dict[str, int]


def tensor_shapes(parameters: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of weights and moments by key, for the shapes of parameters by name."""
    kinds = (WEIGHT, *(f"{moment}/" for moment in MOMENTS))
    return {kind + name: tuple(shape) for name, shape in parameters.items() for kind in kinds}


def adam_state(optimizer: torch.optim.Optimizer, parameter: Tensor, fused: bool) -> dict[str, Any]:
    """AdamW's state of one parameter, made as torch makes it in the first step where there is none yet."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu")
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state


def muon_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    """Muon's, likewise."""
    state = optimizer.state[parameter]
    if not state:
        state.update(
            {moment: torch.zeros_like(parameter, memory_format=torch.preserve_format) for moment in MUON_MOMENTS}
        )
    return state


def whole_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
    """The state of a module whose parameters and optimizer are whole on each rank: one device, or DDP. Weights that are
    not trained have no more than their values."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    shapes: dict[str, tuple[int, ...]] = {}
    fragments, steps = [], {}
    for name, parameter in module.named_parameters():
        group = groups.get(id(parameter))
        moments: tuple[str, ...] = ()
        state: dict[str, Any] = {}
        if group is not None and is_muon(group):
            moments, state = MUON_MOMENTS, muon_state(optimizer, parameter)
        elif group is not None:
            moments, state = MOMENTS, adam_state(optimizer, parameter, bool(group["fused"]))
            steps[name] = int(state["step"])
        tensors = {WEIGHT: parameter.detach(), **{f"{moment}/": state[moment] for moment in moments}}
        fragments += [Fragment(kind + name, 0, tensor.view(-1)) for kind, tensor in tensors.items()]
        shapes |= {kind + name: tuple(parameter.shape) for kind in tensors}
    return TrainingState(shapes, fragments, replicated=True, steps=steps)


@dataclass(frozen=True)
class StateFile:
    """A file of a checkpoint: the rank that writes it, and the tensors in it."""

    name: str
    writer: int
    keys: tuple[str, ...]


def plan_files(
    shapes: Mapping[str, tuple[int, ...]], writers: int, file_bytes: int = FILE_BYTES
) -> list[list[StateFile]]:
    """Which rank writes which tensors: for each rank its files.

    Tensors go to the ranks largest first, each to the one with the least so far; a rank's tensors are cut into files
    of at most file_bytes (a larger tensor has a file of its own). The same on all ranks.
    """
    sizes = {key: 4 * prod(shape) for key, shape in shapes.items()}
    load = [(0, rank) for rank in range(writers)]
    owned: list[set[str]] = [set() for _ in range(writers)]
    for key in sorted(sizes, key=lambda key: -sizes[key]):
        total, rank = heapq.heappop(load)
        owned[rank].add(key)
        heapq.heappush(load, (total + sizes[key], rank))
    number, plan = 0, []
    for rank, mine in enumerate(owned):
        files: list[list[str]] = []
        used = 0
        for key in (key for key in shapes if key in mine):
            if not files or used + sizes[key] > file_bytes:
                files.append([])
                used = 0
            files[-1].append(key)
            used += sizes[key]
        plan.append([StateFile(STATE_FILE.format(number + i), rank, tuple(keys)) for i, keys in enumerate(files)])
        number += len(files)
    return plan


def gather_objects(value: Any) -> list[Any]:
    """`value` of each rank, on all ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def agreement() -> Iterator[None]:
    """Work on files that must succeed on all ranks, which wait for each other at the end: raises SaveError on all of
    them when the disk of any refuses."""
    failure: str | None = None
    try:
        yield
    except (OSError, SafetensorError) as error:
        failure = str(error)
    messages = gather_objects(failure)
    failed = [f"rank {rank}: {message}" for rank, message in enumerate(messages) if message is not None]
    if failed:
        raise SaveError("; ".join(failed[:3]) + (f" (and {len(failed) - 3} more ranks)" if failed[3:] else ""))


def not_finite(state: TrainingState) -> str | None:
    """Key of a tensor that is not finite on some rank; None where all are. To be called by all ranks."""
    found = next((fragment.key for fragment in state.fragments if not is_finite(fragment.values)), None)
    return next((key for key in gather_objects(found) if key is not None), None)


@contextmanager
def together() -> Iterator[None]:
    """Reading that must succeed on all ranks, which wait for each other at the end: raises on all of them, with the
    message of the first one where it failed, Unreadable where the system refused there and ValueError otherwise."""
    failure: Exception | None = None
    try:
        yield
    except (ValueError, OSError) as error:
        failure = error
    kind = Unreadable if isinstance(failure, OSError) else ValueError
    for found in gather_objects((kind, error_line(failure)) if failure else None):
        if found is not None:
            raise found[0](found[1]) from failure


def check_stored(stored: StoredTensors) -> None:
    """Raises, on all ranks, ValueError when a tensor has not the bytes that were written and Unreadable when it cannot
    be read; each reads its share."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    plan = plan_files(stored.shapes() if stored.checksums else {}, world_size)
    with together():
        for file in tqdm(plan[rank], desc=f"checksums of {stored.folder}", unit="file", delay=5, disable=rank > 0):
            for key in file.keys:
                stored.check(key)


def collect(
    state: TrainingState,
    plan: list[list[StateFile]],
    rank: int,
    device: torch.device,
    room: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[StateFile, dict[str, Tensor]]]:
    """This rank's files with their tensors (float32, CPU, whole), one after another; ranks advance together.

    Args:
        device: where tensors travel between ranks.
        room: tensors of the shapes in `state` by key, into which those of this rank are copied, on CUDA without waiting
            for the device; without it they may be the memory that training uses.
    """
    if state.replicated:
        values = {fragment.key: fragment.values for fragment in state.fragments}
        for file in plan[rank]:
            tensors = {key: values[key].view(state.shapes[key]).float() for key in file.keys}
            if room is None:
                yield file, {key: tensor.cpu() for key, tensor in tensors.items()}
            else:
                yield file, {key: room[key].copy_(tensor, non_blocking=True) for key, tensor in tensors.items()}
        return
    tables = gather_objects([(fragment.key, fragment.start, fragment.values.numel()) for fragment in state.fragments])
    for number in range(max(len(files) for files in plan)):
        files = [files[number] if number < len(files) else None for files in plan]
        mine = files[rank]
        keys = mine.keys if mine else ()
        tensors = {key: torch.empty(state.shapes[key]) if room is None else room[key] for key in keys}
        _exchange(state, files, tables, rank, device, tensors)
        if mine:
            yield mine, tensors


@dataclass(frozen=True)
class _Piece:
    """Part of a fragment within a file: its position in the file's elements, in the tensor, and in the fragment."""

    position: int
    key: str
    start: int
    offset: int
    count: int


def _exchange(
    state: TrainingState,
    files: list[StateFile | None],
    tables: list[list[tuple[str, int, int]]],
    rank: int,
    device: torch.device,
    tensors: Mapping[str, Tensor],
) -> None:
    """Fill `tensors`, those of files[rank], from the fragments of all ranks. files, tables: one of each rank."""
    sizes = {key: prod(shape) for key, shape in state.shapes.items()}
    places = [_places(file, sizes) for file in files]
    values = {(fragment.key, fragment.start): fragment.values for fragment in state.fragments}
    outgoing = [_pieces(tables[rank], place) for place in places]
    incoming = [_pieces(table, places[rank]) for table in tables]
    longest = max(sum(sizes[key] for key in file.keys) for file in files if file)
    for begin in range(0, longest, ROUND_ELEMENTS):
        window = range(begin, min(begin + ROUND_ELEMENTS, longest))
        send, receive = ([_within(pieces, window) for pieces in side] for side in (outgoing, incoming))
        counts_out, counts_in = ([sum(piece.count for piece in pieces) for pieces in side] for side in (send, receive))
        parts = [
            values[piece.key, piece.start - piece.offset].narrow(0, piece.offset, piece.count)
            for pieces in send for piece in pieces
        ]  # fmt: skip
        sent = torch.cat([torch.empty(0, device=device), *(part.float().to(device) for part in parts)])
        received = torch.empty(sum(counts_in), device=device)
        dist.all_to_all_single(received, sent, counts_in, counts_out)
        arrived = [piece for pieces in receive for piece in pieces]
        for piece, part in zip(arrived, received.cpu().split([piece.count for piece in arrived]), strict=True):
            tensors[piece.key].view(-1).narrow(0, piece.start, piece.count).copy_(part)


def _places(file: StateFile | None, sizes: Mapping[str, int]) -> dict[str, int]:
    """Where each tensor begins in the elements of a file."""
    places, position = {}, 0
    for key in file.keys if file else ():
        places[key] = position
        position += sizes[key]
    return places


def _pieces(table: list[tuple[str, int, int]], places: Mapping[str, int]) -> list[_Piece]:
    """The fragments of a rank that belong to a file, in the order in which they travel."""
    found = (_Piece(places[key] + start, key, start, 0, count) for key, start, count in table if key in places)
    return sorted(found, key=lambda piece: piece.position)


def _within(pieces: list[_Piece], window: range) -> list[_Piece]:
    """The parts of the pieces that lie in a window of the file's elements."""
    parts = []
    for piece in pieces:
        skipped = max(0, window.start - piece.position)
        count = min(piece.position + piece.count, window.stop) - piece.position - skipped
        if count > 0:
            parts.append(
                _Piece(piece.position + skipped, piece.key, piece.start + skipped, piece.offset + skipped, count)
            )
    return parts


@torch.no_grad()
def read_state(stored: Mapping[str, Tensor], state: TrainingState) -> None:
    """Copy this rank's share of the stored tensors into its fragments.

    Raises:
        ValueError: a tensor is missing, has another shape or is not finite.
    """
    for fragment in state.fragments:
        tensor, shape = stored.get(fragment.key), state.shapes[fragment.key]
        if tensor is None or tuple(tensor.shape) != shape:
            found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
            raise ValueError(f"the checkpoint's {fragment.key} {found}, expected shape {shape}")
        fragment.values.copy_(tensor.view(-1).narrow(0, fragment.start, fragment.values.numel()))
        if not is_finite(fragment.values):
            raise ValueError(f"the checkpoint's {fragment.key} is not finite: choose another checkpoint")
