"""Launch configurations of the Triton kernels, by pass, device generation, head dim and dtype: never by length, so that
a new length compiles nothing."""

from dataclasses import dataclass, replace
from functools import cache

import torch


@dataclass(frozen=True)
class Launch:
    """warps: of the Triton compiler. stages: of its software pipeline. programs: resident programs per multiprocessor.
    registers: a cap per thread, which lets more programs be resident. tiles, span, fold: of the scan, tiles of queries
    and of keys that it takes at once, columns of a tile that share a slot. step: of the backward passes, keys at a time
    (queries in the pass over keys). transposed: layout of the tiles in the pass over keys. Of block_sparse: fused, the
    design of the gate; scan_stages, of the scan that lists blocks; descriptors, loads by TMA, else by pointers."""

    warps: int
    stages: int
    programs: int
    registers: int | None = None
    tiles: int = 1
    span: int = 1
    fold: int = 1
    step: int = 64
    transposed: bool = False
    fused: bool = False
    scan_stages: int = 1
    descriptors: bool = False

    @property
    def options(self) -> dict[str, int | None]:
        """Launch options of Triton."""
        return dict(num_warps=self.warps, maxnreg=self.registers)


LARGE_SHARED_MEMORY = 160 * 1024  # bytes, of A100 and later data centre GPUs
# Shared memory in bytes, and the widest heads in 16 bits and in float32 whose kernels take no more, as
# tests.kernels.compile_for prints: H100 has 227 KiB, A100 163, RTX 30 to 50 99
WIDEST_HEADS = ((200 * 1024, 256, 256), (LARGE_SHARED_MEMORY, 256, 128), (0, 128, 64))

DECODING = {  # on an H200 with bfloat16, head dims 64 and 128, 4K to 128K keys; blocks of the solver with them
    "decode_scores": Launch(warps=4, stages=3, programs=4),
    "decode_solve": Launch(warps=8, stages=1, programs=1),
    "decode_values": Launch(warps=2, stages=1, programs=4),
}

# block_sparse's design: on an H200 with bfloat16, at head dim 64 the list is the faster one at a density of 0.25 and
# the branch at 0.75; at 128 the branch is at both. A "_pointers" entry stands in where TMA cannot be used. The given_
# ones are not measured: of 128 queries those of the same loop over a list or all blocks, of 64 what spills little
HEAD_DIM_64 = {
    "scan": Launch(warps=4, stages=3, programs=2, tiles=2),
    "refine": Launch(warps=4, stages=2, programs=4, registers=128),
    "sum": Launch(warps=4, stages=2, programs=3, registers=168),
    "backward_queries": Launch(warps=4, stages=3, programs=3, registers=168),
    "backward_keys": Launch(warps=4, stages=3, programs=2),
    "block_sparse": Launch(warps=4, stages=2, programs=3, registers=168, scan_stages=3, descriptors=True),
    "block_sparse_pointers": Launch(warps=8, stages=2, programs=2, scan_stages=3),
    "block_sparse_given_128": Launch(warps=4, stages=2, programs=3, registers=168, descriptors=True),
    "block_sparse_given_128_pointers": Launch(warps=8, stages=2, programs=2),
    "block_sparse_given_64": Launch(warps=4, stages=2, programs=3, registers=168, descriptors=True),
    "block_sparse_given_64_pointers": Launch(warps=4, stages=2, programs=2),
    "block_sparse_ungated": Launch(warps=4, stages=3, programs=2),
    **DECODING,
}
HEAD_DIM_128 = {
    "scan": Launch(warps=4, stages=3, programs=2, tiles=2, fold=2),
    "refine": Launch(warps=4, stages=2, programs=4, registers=128),
    "sum": Launch(warps=4, stages=3, programs=2),
    "backward_queries": Launch(warps=4, stages=2, programs=2),
    "backward_keys": Launch(warps=4, stages=3, programs=2, step=32, transposed=True),
    "block_sparse": Launch(warps=8, stages=3, programs=2, registers=128, fused=True, descriptors=True),
    "block_sparse_pointers": Launch(warps=8, stages=3, programs=1, fused=True),
    "block_sparse_given_128": Launch(warps=8, stages=2, programs=2, registers=128, descriptors=True),
    "block_sparse_given_128_pointers": Launch(warps=8, stages=3, programs=1),
    "block_sparse_given_64": Launch(warps=4, stages=2, programs=2, descriptors=True),
    "block_sparse_given_64_pointers": Launch(warps=4, stages=2, programs=2),
    "block_sparse_ungated": Launch(warps=8, stages=2, programs=2, registers=128, descriptors=True),
    "block_sparse_ungated_pointers": Launch(warps=8, stages=3, programs=1),
    **DECODING,
}


@cache
def launch_for(
    kernel: str, head_dim: int, dtype: torch.dtype, device: torch.device, descriptors: bool = False
) -> Launch:
    """kernel: a key of the tables. head_dim: padded to a power of two. descriptors: whether TMA can read the tensors
    (`launching.describable`)."""
    if device.type == "cpu":  # Triton's interpreter
        return Launch(warps=4, stages=1, programs=2, tiles=2, span=2, fold=2)
    if dtype == torch.float32 or head_dim > 128:
        wide = dtype == torch.float32 and head_dim > 128  # four tiles of 64 rows would not fit in shared memory
        step = 32 if wide or kernel == "backward_keys" else 64
        return Launch(warps=8, stages=1 if dtype == torch.float32 else 2, programs=1, step=step, transposed=True)
    table = HEAD_DIM_128 if head_dim > 64 else HEAD_DIM_64
    hopper = torch.cuda.get_device_capability(device)[0] >= 9
    launch = table[kernel]
    if launch.descriptors and not (descriptors and hopper):
        launch = table[f"{kernel}_pointers"]
    if not hopper:
        # Ampere and Ada, by rule: operands of their dots live in registers, so no cap; Ada has 99 KiB of shared memory
        small = head_dim > 64 and shared_memory(device) < LARGE_SHARED_MEMORY
        return replace(launch, registers=None, programs=2, stages=1 if small else 2)
    return launch


def program_count(launch: Launch, device: torch.device, n_tasks: int) -> int:
    """Programs of a persistent launch."""
    if device.type == "cpu":
        return min(launch.programs, n_tasks)
    return min(_multiprocessors(device) * launch.programs, n_tasks)


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that one program can have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


def widest_head_dim(dtype: torch.dtype, shared_memory: int) -> int:
    """Widest heads of this dtype whose attention kernels fit into the shared memory of a device, in bytes."""
    half, single = next(widths for least, *widths in WIDEST_HEADS if shared_memory >= least)
    return single if dtype == torch.float32 else half


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
