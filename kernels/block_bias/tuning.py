"""Launch configurations of attention with a bias for each block: tables by reasoning, not measured."""

from dataclasses import replace
from functools import cache

import torch

from kernels.common.tuning import TileLaunch, tile_launch

FEW_QUERIES = 16  # up to which they share one small tile, as in decoding

# by padded head dim, one number of rows each: which blocks are live is found for tiles of queries, once for all passes
TABLES = {
    64: {
        "forward": TileLaunch(rows=64, keys=64, warps=4, stages=3),
        "queries": TileLaunch(rows=64, keys=64, warps=4, stages=2),
        "keys": TileLaunch(rows=64, keys=64, warps=4, stages=2),
    },
    128: {
        "forward": TileLaunch(rows=64, keys=64, warps=4, stages=2),
        "queries": TileLaunch(rows=64, keys=64, warps=8, stages=2),
        "keys": TileLaunch(rows=64, keys=64, warps=8, stages=2),
    },
}
WIDE = {  # float32, and head dims past 128
    "forward": TileLaunch(rows=32, keys=64, warps=8, stages=1),
    "queries": TileLaunch(rows=32, keys=32, warps=8, stages=1),
    "keys": TileLaunch(rows=32, keys=32, warps=8, stages=1),
}
INTERPRETED = TileLaunch(rows=64, keys=64, warps=4, stages=1)


@cache
def block_bias_launch(
    design: str, n_queries: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> TileLaunch:
    """design: a key of the tables. head_dim: padded to a power of two."""
    interpreted = device.type == "cpu"
    launch = INTERPRETED if interpreted else tile_launch(TABLES, WIDE, design, head_dim, dtype, device)
    return replace(launch, rows=FEW_QUERIES) if n_queries <= FEW_QUERIES else launch
