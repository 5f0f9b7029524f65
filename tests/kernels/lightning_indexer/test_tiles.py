"""Which keys a tile of queries loops over."""

import pytest
import torch
import triton
import triton.language as tl

from kernels.lightning_indexer.tiles import key_range
from tests.kernels.helpers import DEVICE, needs_triton

pytestmark = needs_triton


@triton.jit
def store_range(p_first, p_end, p_out, BN: tl.constexpr):
    row = tl.arange(0, 4)
    lo, hi = key_range(tl.load(p_first + row), tl.load(p_end + row), BN)
    tl.store(p_out, lo)
    tl.store(p_out + 1, hi)


@pytest.mark.parametrize(
    ("first", "end", "expected"),
    [
        ([0, 0, 0, 0], [1, 2, 3, 4], (0, 4)),
        ([70, 70, 90, 90], [75, 80, 95, 120], (64, 120)),
        ([70, 70, 200, 2**31 - 1], [75, 80, 200, 2**31 - 1], (64, 80)),  # a row without keys, one past the last
        # none sees a key: lo and a step of the loop behind it must not be beyond the largest integer
        ([5, 5, 9, 2**31 - 1], [5, 5, 9, 2**31 - 1], (0, 0)),
    ],
)
def test_range_of_keys(first: list[int], end: list[int], expected: tuple[int, int]) -> None:
    out = torch.empty(2, dtype=torch.int32, device=DEVICE)
    rows = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (first, end))
    store_range[(1,)](*rows, out, BN=32)
    assert tuple(out.tolist()) == expected
