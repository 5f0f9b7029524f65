"""Which queries read each block: the inverse of what each query selects, made on the device without asking it."""

from typing import NamedTuple

import torch
from torch import Tensor

READERS = 1024  # of a part: a block that more queries read, as a document's first one, is several programs' work
FIELDS = 4  # of a part


class Readers(NamedTuple):
    """order: int32 (B * G * n * count,), places in first_key, by row, group and block, and by query within a block.
    parts: int32 (most, FIELDS), up to READERS of one block each, in the same order: row and group (b * G + g), the
    block's first key, begin and end in `order`; begin = end behind the last one. starts: int32 (B * G * keys + 1,), how
    many parts there are of blocks that begin before each key."""

    order: Tensor
    parts: Tensor
    starts: Tensor


def list_readers(first_key: Tensor, n_keys: int, n_blocks: int) -> Readers:
    """first_key: int32 (B, G, n, count), others than 0 ... n_keys - 1 are no blocks. n_blocks: as in
    `selected_block_attention`; with more, RuntimeError on a CPU, and a device-side assertion on CUDA."""
    batch, groups, n_queries, count = first_key.shape
    device, heads = first_key.device, batch * groups
    places = heads * n_keys  # where a block may begin
    dtype = torch.int32 if places < 2**31 else torch.int64
    head = torch.arange(heads, device=device, dtype=dtype).view(batch, groups, 1, 1)
    real = (first_key >= 0) & (first_key < n_keys)
    place, order = torch.where(real, first_key + head * n_keys, places).flatten().sort(stable=True)
    every = torch.arange(places + 1, device=device, dtype=dtype)
    begins = torch.searchsorted(place, every)  # int64 (places + 1,): readers of blocks before each place
    counts = (begins.diff() + READERS - 1) // READERS  # parts of each
    ends = counts.cumsum(0)
    most = heads * min(n_blocks, n_keys) + place.numel() // READERS
    torch._assert_async(ends[-1] <= most, f"more distinct blocks are selected than n_blocks = {n_blocks}")
    part = torch.arange(most, device=device)
    at = torch.searchsorted(ends, part, right=True).clamp(max=places - 1)
    begin = begins[at] + (part - (ends - counts)[at]) * READERS
    end = torch.minimum(begin + READERS, begins[at + 1])
    live = part < ends[-1]
    parts = torch.stack([at // n_keys, at % n_keys, begin * live, end * live], 1).int()
    starts = torch.cat([torch.zeros_like(ends[:1]), ends]).int()
    return Readers(order.int(), parts, starts)
