"""Launch configurations of block-sparse softmax attention."""

from dataclasses import dataclass
from functools import cache

import torch

from kernels.common.tuning import LARGE_SHARED_MEMORY, Launch, before_hopper, is_hopper, is_wide


@dataclass(frozen=True)
class BlockSparseLaunch(Launch):
    """fused: the gate is a branch in the loop over blocks, else a scan lists blocks first. scan_stages: of that scan.
    descriptors: loads by TMA, else by pointers."""

    fused: bool = False
    scan_stages: int = 1
    descriptors: bool = False


# On an H200 with bfloat16, at head dim 64 the list is the faster one at a density of 0.25 and the branch at 0.75; at
# 128 the branch is at both. A "_pointers" entry stands in where TMA cannot be used. The given_ ones are not measured:
# of 128 queries those of the same loop over a list or all blocks, of 64 what spills little
TABLES = {
    64: {
        "gated": BlockSparseLaunch(warps=4, stages=2, programs=3, registers=168, scan_stages=3, descriptors=True),
        "gated_pointers": BlockSparseLaunch(warps=8, stages=2, programs=2, scan_stages=3),
        "given_128": BlockSparseLaunch(warps=4, stages=2, programs=3, registers=168, descriptors=True),
        "given_128_pointers": BlockSparseLaunch(warps=8, stages=2, programs=2),
        "given_64": BlockSparseLaunch(warps=4, stages=2, programs=3, registers=168, descriptors=True),
        "given_64_pointers": BlockSparseLaunch(warps=4, stages=2, programs=2),
        "ungated": BlockSparseLaunch(warps=4, stages=3, programs=2),
    },
    128: {
        "gated": BlockSparseLaunch(warps=8, stages=3, programs=2, registers=128, fused=True, descriptors=True),
        "gated_pointers": BlockSparseLaunch(warps=8, stages=3, programs=1, fused=True),
        "given_128": BlockSparseLaunch(warps=8, stages=2, programs=2, registers=128, descriptors=True),
        "given_128_pointers": BlockSparseLaunch(warps=8, stages=3, programs=1),
        "given_64": BlockSparseLaunch(warps=4, stages=2, programs=2, descriptors=True),
        "given_64_pointers": BlockSparseLaunch(warps=4, stages=2, programs=2),
        "ungated": BlockSparseLaunch(warps=8, stages=2, programs=2, registers=128, descriptors=True),
        "ungated_pointers": BlockSparseLaunch(warps=8, stages=3, programs=1),
    },
}


@cache
def block_sparse_launch(
    design: str, head_dim: int, dtype: torch.dtype, device: torch.device, descriptors: bool
) -> BlockSparseLaunch:
    """design: a key of TABLES[64] without "_pointers". head_dim: padded to a power of two. descriptors: whether TMA can
    read the tensors (`launching.describable`)."""
    if device.type == "cpu":  # Triton's interpreter
        return BlockSparseLaunch(warps=4, stages=1, programs=2)
    if is_wide(head_dim, dtype):
        return BlockSparseLaunch(warps=8, stages=1 if dtype == torch.float32 else 2, programs=1)
    table = TABLES[128 if head_dim > 64 else 64]
    launch = table[design]
    if launch.descriptors and not (descriptors and is_hopper(device)):
        launch = table[f"{design}_pointers"]
    return launch if is_hopper(device) else before_hopper(launch, head_dim, device)


def widest_head_dim(dtype: torch.dtype, shared_memory: int) -> int:
    """Widest heads whose 128 queries, keys and values fit into a device's shared memory, in bytes."""
    large = shared_memory >= LARGE_SHARED_MEMORY
    return (128 if large else 64) if dtype == torch.float32 else (256 if large else 128)
