"""What launch configurations of the Triton kernels share. Tables stand beside the kernels (`alpha_entmax/tuning.py`,
`block_sparse/tuning.py`): by pass, device generation, head dim and dtype, never by length, so that a new length
compiles nothing."""

from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

import torch

from kernels.common.backends import constant


@dataclass(frozen=True)
class Launch:
    """warps: of the Triton compiler. stages: of its software pipeline. programs: resident programs per multiprocessor.
    registers: a cap per thread, which lets more programs be resident."""

    warps: int
    stages: int
    programs: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int | None]:
        """Launch options of Triton."""
        return dict(num_warps=self.warps, maxnreg=self.registers)


@dataclass(frozen=True)
class TileLaunch:
    """rows: of a tile of queries. keys: of a tile, at most (a block of more is several tiles). warps, stages: of the
    Triton compiler and its software pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


L = TypeVar("L", bound=Launch)
LARGE_SHARED_MEMORY = 160 * 1024  # bytes, of A100 and later data centre GPUs; RTX 30 to 50 have 99 KiB


def program_count(launch: Launch, device: torch.device, n_tasks: int) -> int:
    """Programs of a persistent launch."""
    if device.type == "cpu":
        return min(launch.programs, n_tasks)
    return min(_multiprocessors(device) * launch.programs, n_tasks)


def is_hopper(device: torch.device) -> bool:
    """Or later."""
    return torch.cuda.get_device_capability(device)[0] >= 9


def is_wide(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether rows are so long that tables are not by head dim."""
    return dtype == torch.float32 or head_dim > 128


def before_hopper(launch: L, head_dim: int, device: torch.device) -> L:
    """Ampere and Ada, by rule: operands of their dots live in registers, so no cap; Ada has 99 KiB of shared memory."""
    small = head_dim > 64 and shared_memory(device) < LARGE_SHARED_MEMORY
    return replace(launch, registers=None, programs=2, stages=1 if small else 2)


def tile_launch(
    tables: dict[int, dict[str, TileLaunch]], wide: dict[str, TileLaunch], design: str, head_dim: int,
    dtype: torch.dtype, device: torch.device,
) -> TileLaunch:  # fmt: skip
    """Of tables by padded head dim, 64 and 128, and one for wide rows; by rule where shared memory is small."""
    if is_wide(head_dim, dtype):
        return wide[design]
    launch = tables[128 if head_dim > 64 else 64][design]
    if shared_memory(device) < LARGE_SHARED_MEMORY:
        return replace(launch, stages=1 if head_dim > 64 else 2)
    return launch


def key_tile(launch: TileLaunch, block_size: int) -> int:
    """A block's keys, padded to a power of two, or those of one of its tiles."""
    return min(launch.keys, max(16, 1 << (block_size - 1).bit_length()))


@constant
def shared_memory(device: torch.device) -> int:
    """Bytes that one program can have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
