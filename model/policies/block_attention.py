"""Attention of policies that keep whole blocks: by the block-sparse kernel where that runs and the blocks fit it."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernels.block_sparse.attention import FLOAT32_HEAD_DIM, block_sparse_softmax_attention, runs_on_triton
from kernels.block_sparse.reference import KEY_BLOCK, QUERY_BLOCKS, grid_of_blocks
from kernels.common.visibility import TILE
from model.config import ModelConfig
from model.policies.policy import Attended, SequenceView, SparsePolicy, masked_attention
from model.policies.selection import BlockSelection

COUNTS_AT_ONCE = 2**24  # 128 MiB of int64


class BlockPolicy(SparsePolicy):
    """A policy that keeps whole blocks.

    On CUDA attention over them is the Triton kernel's, at the precision of the inputs' dtype, where it takes inputs and
    blocks (kernel_blocks) and no window is set; `masked_attention` everywhere else.
    """

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, int]:
        """How many queries and how many keys a block has."""

    @abstractmethod
    def select(self, q: Tensor, k: Tensor, view: SequenceView) -> BlockSelection: ...

    def choose(self, q: Tensor, k: Tensor, view: SequenceView) -> tuple[BlockSelection, Tensor | int]:
        return self.select(q, k, view), 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, view: SequenceView) -> Attended:
        selection, estimated = self.choose(q, k, view)
        found = None
        if view.window is None and runs_on_triton(q[None]):
            found = kernel_blocks(selection, q.shape[1], k.shape[1])
        if found is None:
            attended = masked_attention(q, k, v, view, selection)
        else:
            blocks, query_block = found
            attended = block_attention(q, k, v, view, query_block, backend="triton", blocks=blocks)
        return replace(attended, estimated=estimated)

    def faster(self, device: torch.device, config: ModelConfig) -> bool:
        takes = config.window is None and config.head_size <= FLOAT32_HEAD_DIM
        return device.type == "cuda" and takes and query_block_of(self.sizes, 0) is not None


def query_block_of(sizes: tuple[int, int], query_start: int) -> int | None:
    """The largest of the kernel's blocks of queries that blocks of these sizes, which start at this position, consist
    of; None where the kernel's grid of positions cuts them, or its blocks of keys do not fit."""
    if sizes[1] % KEY_BLOCK:
        return None
    return next((size for size in QUERY_BLOCKS if not (sizes[0] % size or query_start % size)), None)


def kernel_blocks(selection: BlockSelection, n_queries: int, n_keys: int) -> tuple[Tensor, int] | None:
    """The selection as `block_sparse_softmax_attention` takes it: blocks (1, H or 1, query blocks, key blocks) and
    query_block. None where they are not those of its grid.

    Most policies' blocks count from their first query, the kernel's from position 0: chunks of a prompt fit where they
    start at a multiple of 64, a single block of queries anywhere.
    """
    query_block, key_block = selection.query_block, selection.key_block
    blocks, offset, query_start = selection.blocks, selection.query_offset, n_keys - n_queries
    if selection.key_offset:
        return None
    size = query_block_of((query_block, key_block), query_start - offset)
    if blocks.shape[1] == 1 and key_block % KEY_BLOCK == 0:
        size, offset = min(QUERY_BLOCKS), 0
        query_block = size
        blocks = blocks.expand(-1, grid_of_blocks(n_queries, n_keys, size)[0], -1)
    if size is None:
        return None
    n_rows, n_columns = grid_of_blocks(n_queries, n_keys, size)
    rows = blocks.repeat_interleave(query_block // size, 1)[:, offset // size :][:, :n_rows]
    return rows.repeat_interleave(key_block // KEY_BLOCK, 2)[None, :, :, :n_columns], size


def block_attention(q: Tensor, k: Tensor, v: Tensor, view: SequenceView, query_block: int, **options: Any) -> Attended:
    """`block_sparse_softmax_attention` of one sequence without a window. options: thresholds or blocks, and backend."""
    options |= dict(scale=view.scale, alibi_slopes=view.alibi_slopes, query_block=query_block, return_stats=True)
    out, stats = block_sparse_softmax_attention(q[None], k[None], v[None], **options)
    return Attended(out[0], *count_kept(stats.kept[0], q.shape[1], k.shape[1], query_block))


def count_kept(kept: Tensor, n_queries: int, n_keys: int, query_block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kept pairs (H,), visible pairs (), live tiles (H,), all tiles (), as in Attended. kept: bool (H, query blocks,
    key blocks) of causal attention, on the grid of positions."""
    device, offset = kept.device, n_keys - n_queries
    first_block = offset // query_block
    first = torch.arange(kept.shape[2], device=device) * KEY_BLOCK
    width = (n_keys - first).clamp(max=KEY_BLOCK)

    def pairs_before(position: Tensor) -> Tensor:
        """Visible pairs of queries at positions below `position` (n,) with each block of keys: (n, key blocks)."""
        seen = (position[:, None] - first).clamp(min=0)
        ramp = torch.minimum(seen, width)
        return ramp * (ramp + 1) // 2 + (seen - ramp) * width

    edges = (torch.arange(kept.shape[1] + 1, device=device) + first_block) * query_block
    edges = edges.clamp(offset, n_keys)
    pairs, visible = torch.zeros(len(kept), dtype=torch.int64, device=device), torch.zeros_like(edges[0])
    for rows in _rows_at_once(kept, kept.shape[1]):
        part = pairs_before(edges[rows.start : rows.stop + 1]).diff(dim=0)  # [query blocks, key blocks]
        pairs += (kept[:, rows] * part).sum((1, 2))
        visible += part.sum()

    start = torch.arange(0, n_queries, TILE, device=device) + offset  # position of a tile's first query
    stop = (start + TILE).clamp(max=n_keys)
    end_of_block = (start // query_block + 1) * query_block  # a tile off the grid lies in two blocks of queries
    live = torch.zeros_like(pairs)
    for rows in _rows_at_once(kept, len(start)):
        parts = (torch.minimum(end_of_block, stop)[rows] - 1, stop[rows] - 1)  # last query of either
        shown = [kept[:, last // query_block - first_block] & (first <= last[:, None]) for last in parts]
        live += (shown[0] | shown[1]).sum((1, 2))
    total = (-(-stop // KEY_BLOCK)).sum()
    return pairs, visible, live, total


def _rows_at_once(kept: Tensor, n_rows: int) -> Iterator[slice]:
    """Rows 0 ... n_rows - 1, as many at a time as COUNTS_AT_ONCE takes of all heads' key blocks."""
    step = max(1, COUNTS_AT_ONCE // max(1, kept.shape[0] * kept.shape[2]))
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))
