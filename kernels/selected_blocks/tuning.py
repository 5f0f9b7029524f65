"""Launch configurations of attention over selected blocks: tables by reasoning, FEW_QUERIES by measurement."""

from functools import cache

import torch

from kernels.common.tuning import TileLaunch, tile_launch

# of all batch rows, up to which queries are taken one by one: making lists takes longer (results/kernels: at 8,192 both
# take 1.3 ms)
FEW_QUERIES = 8192

# by padded head dim. "query": the rows are of one query, padded; "key": rows are gathered for a block; "merge": sums.
# Rows are pairs of a query and a head
TABLES = {
    64: {
        "query": TileLaunch(rows=16, keys=64, warps=4, stages=3),
        "key": TileLaunch(rows=64, keys=64, warps=4, stages=3),
        "backward": TileLaunch(rows=64, keys=64, warps=4, stages=2),
        "merge": TileLaunch(rows=32, keys=64, warps=4, stages=1),
    },
    128: {
        "query": TileLaunch(rows=16, keys=64, warps=4, stages=2),
        "key": TileLaunch(rows=64, keys=64, warps=4, stages=2),
        "backward": TileLaunch(rows=64, keys=64, warps=8, stages=2),
        "merge": TileLaunch(rows=16, keys=64, warps=4, stages=1),
    },
}
WIDE = {  # float32, and head dims past 128
    "query": TileLaunch(rows=16, keys=32, warps=4, stages=1),
    "key": TileLaunch(rows=32, keys=64, warps=8, stages=1),
    "backward": TileLaunch(rows=32, keys=32, warps=8, stages=1),
    "merge": TileLaunch(rows=16, keys=64, warps=4, stages=1),
}
INTERPRETED = TileLaunch(rows=64, keys=64, warps=4, stages=1)


@cache
def selected_launch(design: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> TileLaunch:
    """design: a key of the tables. head_dim: padded to a power of two."""
    if device.type == "cpu":  # Triton's interpreter
        return TileLaunch(16, 64, 4, 1) if design == "query" else INTERPRETED
    return tile_launch(TABLES, WIDE, design, head_dim, dtype, device)
