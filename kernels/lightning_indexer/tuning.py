"""Launch configurations of the indexer's kernels, by reasoning."""

from dataclasses import dataclass
from functools import cache

import torch

from kernels.common.tuning import LARGE_SHARED_MEMORY, is_wide, shared_memory


@dataclass(frozen=True)
class IndexerLaunch:
    """rows, keys: of a tile. warps, stages: of the Triton compiler and its software pipeline over heads (in
    "log_sum_exp" of attention over keys)."""

    rows: int
    keys: int
    warps: int
    stages: int


# by padded head dim, the larger of attention's and the indexer's
TABLES = {
    64: {
        "scores": IndexerLaunch(rows=64, keys=64, warps=4, stages=2),
        "log_sum_exp": IndexerLaunch(rows=64, keys=64, warps=4, stages=3),
        "query": IndexerLaunch(rows=64, keys=64, warps=8, stages=2),
        "key": IndexerLaunch(rows=64, keys=64, warps=8, stages=2),
        "attend": IndexerLaunch(rows=64, keys=64, warps=4, stages=2),
        "attend backward": IndexerLaunch(rows=64, keys=64, warps=8, stages=2),
    },
    128: {
        "scores": IndexerLaunch(rows=64, keys=64, warps=4, stages=2),
        "log_sum_exp": IndexerLaunch(rows=64, keys=64, warps=4, stages=2),
        "query": IndexerLaunch(rows=64, keys=64, warps=8, stages=2),
        "key": IndexerLaunch(rows=64, keys=64, warps=8, stages=2),
        "attend": IndexerLaunch(rows=64, keys=64, warps=4, stages=2),
        "attend backward": IndexerLaunch(rows=64, keys=64, warps=8, stages=2),
    },
}
WIDE = IndexerLaunch(rows=32, keys=32, warps=4, stages=1)  # float32, and head dims past 128
DIGIT_BITS = 7  # of scores that one pass over a row looks at: 128 bins, since a histogram's time grows with them
CHUNK = 2048  # scores of a row that are looked at together where keys are chosen
INTERPRETED = IndexerLaunch(rows=32, keys=64, warps=4, stages=1)


@cache
def indexer_launch(design: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> IndexerLaunch:
    """design: a key of the tables. head_dim: padded to a power of two. dtype: float32 where any operand is."""
    if device.type == "cpu":  # Triton's interpreter
        return INTERPRETED
    if is_wide(head_dim, dtype):
        return WIDE
    launch = TABLES[128 if head_dim > 64 else 64][design]
    if shared_memory(device) < LARGE_SHARED_MEMORY:
        return IndexerLaunch(launch.rows, launch.keys, launch.warps, 1)
    return launch
