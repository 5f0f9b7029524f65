"""Launch configurations of attention over selected blocks: tables by reasoning, FEW_QUERIES by measurement."""

from dataclasses import dataclass
from functools import cache

import torch

from kernels.common.tuning import LARGE_SHARED_MEMORY, is_wide, shared_memory

# of all batch rows, up to which queries are taken one by one: making lists takes longer (results/kernels: at 8,192 both
# take 1.3 ms)
FEW_QUERIES = 8192


@dataclass(frozen=True)
class SelectedLaunch:
    """rows: of a tile, pairs of a query and a head. keys: of a tile, at most (a block of more is several tiles). warps,
    stages: of the Triton compiler and its software pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


# by padded head dim. "query": the rows are of one query, padded; "key": rows are gathered for a block; "merge": sums
TABLES = {
    64: {
        "query": SelectedLaunch(rows=16, keys=64, warps=4, stages=3),
        "key": SelectedLaunch(rows=64, keys=64, warps=4, stages=3),
        "backward": SelectedLaunch(rows=64, keys=64, warps=4, stages=2),
        "merge": SelectedLaunch(rows=32, keys=64, warps=4, stages=1),
    },
    128: {
        "query": SelectedLaunch(rows=16, keys=64, warps=4, stages=2),
        "key": SelectedLaunch(rows=64, keys=64, warps=4, stages=2),
        "backward": SelectedLaunch(rows=64, keys=64, warps=8, stages=2),
        "merge": SelectedLaunch(rows=16, keys=64, warps=4, stages=1),
    },
}
WIDE = {  # float32, and head dims past 128
    "query": SelectedLaunch(rows=16, keys=32, warps=4, stages=1),
    "key": SelectedLaunch(rows=32, keys=64, warps=8, stages=1),
    "backward": SelectedLaunch(rows=32, keys=32, warps=8, stages=1),
    "merge": SelectedLaunch(rows=16, keys=64, warps=4, stages=1),
}
INTERPRETED = SelectedLaunch(rows=64, keys=64, warps=4, stages=1)


@cache
def selected_launch(design: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> SelectedLaunch:
    """design: a key of the tables. head_dim: padded to a power of two."""
    if device.type == "cpu":  # Triton's interpreter
        return SelectedLaunch(16, 64, 4, 1) if design == "query" else INTERPRETED
    if is_wide(head_dim, dtype):
        return WIDE[design]
    launch = TABLES[128 if head_dim > 64 else 64][design]
    if shared_memory(device) < LARGE_SHARED_MEMORY:
        return SelectedLaunch(launch.rows, launch.keys, launch.warps, 1 if head_dim > 64 else 2)
    return launch
