"""Launch configurations of the importance of blocks, by reasoning."""

from functools import cache

import torch

from kernels.common.tuning import TileLaunch, tile_launch

# by padded head dim. "log_sum_exp": tiles of queries and keys; "spread": of queries and blocks, for which `keys` stands
TABLES = {
    64: {
        "log_sum_exp": TileLaunch(rows=64, keys=64, warps=4, stages=3),
        "spread": TileLaunch(rows=64, keys=64, warps=4, stages=3),
    },
    128: {
        "log_sum_exp": TileLaunch(rows=64, keys=64, warps=4, stages=2),
        "spread": TileLaunch(rows=64, keys=64, warps=4, stages=2),
    },
}
WIDE = dict.fromkeys(TABLES[64], TileLaunch(rows=32, keys=32, warps=4, stages=1))  # float32, and head dims past 128
INTERPRETED = TileLaunch(rows=32, keys=32, warps=4, stages=1)


@cache
def importance_launch(design: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> TileLaunch:
    """design: a key of the tables. head_dim: padded to a power of two."""
    if device.type == "cpu":  # Triton's interpreter
        return INTERPRETED
    return tile_launch(TABLES, WIDE, design, head_dim, dtype, device)
