"""Launch configurations of entmax attention."""

from dataclasses import dataclass, replace
from functools import cache

import torch

from kernels.common.tuning import LARGE_SHARED_MEMORY, Launch, before_hopper, is_hopper, is_wide, shared_memory


@dataclass(frozen=True)
class ScanLaunch(Launch):
    """tiles: of 64 queries, span: of 64 keys, at once. fold: columns of a tile that share a slot."""

    tiles: int = 1
    span: int = 1
    fold: int = 1


@dataclass(frozen=True)
class PassLaunch(Launch):
    """step: keys at a time (queries in the pass over keys); refine takes whole tiles. transposed: layout of the tiles
    in the pass over keys."""

    step: int = 64
    transposed: bool = False


SCAN = {
    64: ScanLaunch(warps=8, stages=2, programs=2, registers=128, tiles=2, span=2, fold=2),
    128: ScanLaunch(warps=4, stages=3, programs=2, tiles=2, fold=2),
}
PASSES = {
    64: {
        "refine": PassLaunch(warps=4, stages=2, programs=4, registers=128),
        "sum": PassLaunch(warps=4, stages=3, programs=3, registers=168),
        "backward_queries": PassLaunch(warps=4, stages=3, programs=3, registers=168, step=32),
        "backward_keys": PassLaunch(warps=4, stages=3, programs=2),
    },
    128: {
        "refine": PassLaunch(warps=4, stages=2, programs=4, registers=128),
        "sum": PassLaunch(warps=4, stages=3, programs=2),
        "backward_queries": PassLaunch(warps=4, stages=2, programs=2),
        "backward_keys": PassLaunch(warps=4, stages=3, programs=2, step=32, transposed=True),
    },
}
DECODING = {  # on an H200 with bfloat16, head dims 64 and 128, 4K to 128K keys; blocks of the solver with them
    "scores": Launch(warps=4, stages=3, programs=4),
    "solve": Launch(warps=8, stages=1, programs=1),
    "values": Launch(warps=2, stages=1, programs=4),
}
# Steps of float32 and of heads past 128, where rows are long: the most that fits beside a tile of queries (of keys), as
# tests.kernels.compile_for prints. small: on GPUs with 99 KiB of shared memory; longest: of float32 past 128
WIDE_STEPS = {"sum": 64, "backward_queries": 64, "backward_keys": 32}
SMALL_STEPS = {"sum": 32, "backward_queries": 16, "backward_keys": 16}
LONGEST_STEPS = {"sum": 64, "backward_queries": 32, "backward_keys": 32}
# Shared memory in bytes, and the widest heads in 16 bits and in float32 whose kernels take no more
WIDEST_HEADS = ((200 * 1024, 256, 256), (0, 256, 128))


@cache
def scan_launch(head_dim: int, dtype: torch.dtype, device: torch.device) -> ScanLaunch:
    """head_dim: padded to a power of two."""
    if device.type == "cpu":  # Triton's interpreter
        return ScanLaunch(warps=4, stages=1, programs=2, tiles=2, span=2, fold=2)
    if is_wide(head_dim, dtype):
        return ScanLaunch(warps=8, stages=_wide_stages(dtype, device), programs=1)
    launch = SCAN[128 if head_dim > 64 else 64]
    return launch if is_hopper(device) else before_hopper(launch, head_dim, device)


@cache
def pass_launch(name: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> PassLaunch:
    """name: a key of PASSES[64]. head_dim: padded to a power of two."""
    if device.type == "cpu":
        return PassLaunch(warps=4, stages=1, programs=2)
    if is_wide(head_dim, dtype):
        row_bytes = head_dim * dtype.itemsize
        small = shared_memory(device) < LARGE_SHARED_MEMORY and row_bytes > 256
        step = (SMALL_STEPS if small else LONGEST_STEPS if row_bytes > 512 else WIDE_STEPS).get(name, 64)
        return PassLaunch(warps=8, stages=_wide_stages(dtype, device), programs=1, step=step, transposed=True)
    launch = PASSES[128 if head_dim > 64 else 64][name]
    return launch if is_hopper(device) else before_hopper(launch, head_dim, device)


@cache
def decode_launch(name: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> Launch:
    """name: a key of DECODING. head_dim: padded to a power of two."""
    launch = DECODING[name]
    if device.type == "cpu":
        return replace(launch, stages=1, programs=2)
    if is_wide(head_dim, dtype):
        return Launch(warps=8, stages=_wide_stages(dtype, device), programs=1)
    return launch if is_hopper(device) else before_hopper(launch, head_dim, device)


def _wide_stages(dtype: torch.dtype, device: torch.device) -> int:
    return 1 if dtype == torch.float32 or shared_memory(device) < LARGE_SHARED_MEMORY else 2


def widest_head_dim(dtype: torch.dtype, shared_memory: int) -> int:
    """Widest heads of this dtype whose attention kernels fit into the shared memory of a device, in bytes."""
    half, single = next(widths for least, *widths in WIDEST_HEADS if shared_memory >= least)
    return single if dtype == torch.float32 else half
