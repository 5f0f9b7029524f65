"""Writing a rank's share of a checkpoint: at once, or from copies in a thread while training goes on."""

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from common.files import flush
from model.checkpoint import TRAINER_STATE, share
from model.checksums import tensor_checksum
from training.distributed.checkpoint_state import (
    StateFile,
    TrainingState,
    agreement,
    collect,
    gather_objects,
    plan_files,
)


class HostCopy:
    """Host memory for one copy of what this rank saves, float32, pinned for CUDA.

    It is made in a thread, as pinning takes seconds for ten gigabytes, and kept for the next save, which has to wait
    until this one is written.
    """

    def __init__(self) -> None:
        self._memory: Future[Tensor] | None = None

    @property
    def begun(self) -> bool:
        return self._memory is not None

    def begin(self, sizes: Mapping[str, int], device: torch.device) -> None:
        """Begin to make room. sizes: elements of each tensor. device: what will be copied lies there."""
        executor = ThreadPoolExecutor(1, "host copy")
        self._memory = executor.submit(host_memory, sum(sizes.values()), device)
        executor.shutdown(wait=False)

    def room(
        self, files: Iterable[StateFile], shapes: Mapping[str, tuple[int, ...]], device: torch.device
    ) -> dict[str, Tensor]:
        """Tensors of all files by key, with unspecified content. device: as in `begin`."""
        sizes = tensor_sizes(files, shapes)
        if self._memory is None or self._memory.result().numel() != sum(sizes.values()):
            self.begin(sizes, device)
        assert self._memory is not None
        parts = self._memory.result().split(list(sizes.values()))
        return {key: part.view(shapes[key]) for key, part in zip(sizes, parts, strict=True)}


def tensor_sizes(files: Iterable[StateFile], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Elements of all files' tensors by key."""
    return {key: prod(shapes[key]) for file in files for key in file.keys}


def host_memory(elements: int, device: torch.device) -> Tensor:
    """float32 (elements,) on the CPU, pinned where the device is of CUDA."""
    if device.type != "cuda" or not elements:
        return torch.empty(elements)
    memory = torch.empty(elements).zero_()  # every page exists before the driver, with its lock held, pins them
    with torch.cuda.device(device):  # a new thread's is the first one
        # torch's own pinned memory comes in powers of two
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)))
    return memory


@dataclass(frozen=True)
class Share:
    """What one rank writes of a checkpoint.

    files: with their tensors (float32, CPU, whole); exhausted whatever fails, as ranks may exchange tensors in it.
    trainer_state: content of Lightning's file, on rank 0.
    """

    folder: Path
    files: Iterable[tuple[StateFile, Mapping[str, Tensor]]]
    trainer_state: bytes | None

    def write(self) -> dict[str, str]:
        """Write the files and flush them to disk. Returns the checksum of each tensor. Raises OSError or
        SafetensorError, the first one, when the disk refuses."""
        failure: Exception | None = None
        checksums: dict[str, str] = {}
        for file, tensors in self.files:
            if failure:
                continue
            try:
                checksums |= {key: tensor_checksum(tensor) for key, tensor in tensors.items()}
                save_file(dict(tensors), self.folder / file.name)
                share(self.folder / file.name)
                flush(self.folder / file.name)
            except (OSError, SafetensorError) as error:
                failure = error
        if failure:
            raise failure
        if self.trainer_state is not None:
            write_trainer_state(self.folder / TRAINER_STATE, self.trainer_state)
        return checksums


def write_trainer_state(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    flush(path)


def take_share(
    folder: Path, state: TrainingState, device: torch.device, trainer_state: bytes | None, copy: HostCopy | None = None
) -> Share:
    """This rank's share of a checkpoint. To be called by all ranks alike.

    Args:
        device: where tensors travel between ranks.
        copy: takes the tensors as they are now; without it the share must be written at once, by all ranks together.
    """
    rank, plan = _plan(state)
    if copy is None:
        return Share(folder, collect(state, plan, rank, device), trainer_state)
    files = list(collect(state, plan, rank, device, copy.room(plan[rank], state.shapes, device)))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Share(folder, files, trainer_state)


def begin_copy(state: TrainingState, device: torch.device, copy: HostCopy) -> None:
    """Begin to make the room that this rank's shares need. device: as in `take_share`."""
    rank, plan = _plan(state)
    copy.begin(tensor_sizes(plan[rank], state.shapes), device)


def _plan(state: TrainingState) -> tuple[int, list[list[StateFile]]]:
    """This rank, and the files of each one."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return rank, plan_files(state.shapes, world_size)


def agreed_checksums(write: Callable[[], dict[str, str]]) -> dict[str, str]:
    """The checksums that `write` returns on any rank. Raises SaveError, on all ranks, where it fails on any of them."""
    with agreement():
        own = write()
    return {key: value for mine in gather_objects(own) for key, value in mine.items()}


class BackgroundSave:
    """A checkpoint that a thread of each rank writes while training goes on.

    The threads take no part in collectives, which would meet training's in another order on each rank. So the ranks
    agree in `finish`, and the marker is written there; where there is one rank, its thread writes the marker too. A
    process that ends, by an exception too, waits for its thread.

    Args:
        share: of this rank, of copies.
        complete: writes the marker, given the checksums of all ranks.

    Attributes:
        folder: of the checkpoint.
        alone: this is the only rank.
        seconds: that this rank's thread has taken, once it is `written`.
    """

    def __init__(self, share: Share, complete: Callable[[dict[str, str]], None]) -> None:
        self.folder, self.seconds = share.folder, 0.0
        self._share, self._complete = share, complete
        self.alone = not dist.is_initialized() or dist.get_world_size() == 1
        executor = ThreadPoolExecutor(1, "checkpoint")
        self._result = executor.submit(self._write)
        executor.shutdown(wait=False)

    @property
    def written(self) -> bool:
        """Whether this rank's thread has ended, whatever came of it."""
        return self._result.done()

    def _write(self) -> dict[str, str]:
        began = time.perf_counter()
        try:
            checksums = self._share.write()
            if self.alone:
                self._complete(checksums)
            return checksums
        finally:
            self.seconds = time.perf_counter() - began

    def finish(self) -> None:
        """Wait until the checkpoint is complete. To be called by all ranks; raises SaveError on all of them."""
        checksums = agreed_checksums(self._result.result)
        if not self.alone:
            with agreement():
                if dist.get_rank() == 0:
                    self._complete(checksums)
