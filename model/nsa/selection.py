"""Which blocks each query selects: equations 8 to 12 of arXiv:2502.11089."""

import torch
from torch import Tensor

from kernels import block_importance_scores
from kernels.block_sparse.attention import runs_on_triton
from model.nsa.blocks import Blocks
from model.visible_attention import blocks_of_rows


@torch.no_grad()
def select_blocks(q: Tensor, compressed: Tensor, blocks: Blocks, slopes: Tensor | None) -> Tensor:
    """The same for all query heads of a group; without gradient, since choosing has none.

    Scores are sums over the group's heads of the compression branch's weights, each divided among the blocks that its
    tokens lie in. The first block and the last select_local ones up to the query's own are always among the chosen.

    Args:
        q: (B, H, n, D). compressed: compressed keys (B, G, C, D). slopes: as in AttentionMetadata.

    Returns: int64 (B, G, n, count), counted from the start of each query's document, -1 where it has no more blocks.
    """
    (batch, heads, n, _), groups = q.shape, compressed.shape[1]
    if runs_on_triton(q):  # what is written is a number a group and block
        parts = blocks_of_rows(n, blocks.n_select, None, batch * groups, q.device)
    else:
        stride = blocks.config.compress_stride
        parts = blocks_of_rows(n, compressed.shape[2], blocks.reach, batch * heads, q.device, stride)
    return torch.cat([_choose_rows(q, compressed, blocks, rows, slopes) for rows in parts], dim=2)


def _choose_rows(q: Tensor, compressed: Tensor, blocks: Blocks, rows: slice, slopes: Tensor | None) -> Tensor:
    """What `select_blocks` returns, of these rows."""
    scores = block_scores(q[:, :, rows], compressed, blocks, rows, slopes, blocks.config.select_local)
    best = scores.topk(min(blocks.config.select_count, blocks.n_select))
    return best.indices.where(best.values > -torch.inf, -1)


def block_scores(
    q: Tensor, compressed: Tensor, blocks: Blocks, rows: slice, slopes: Tensor | None, select_local: int | None = None
) -> Tensor:
    """float32 (float64 for such q) (B, G, rows, n_select), of the queries `rows`, which q holds. select_local: as in
    `block_importance_scores`."""
    config, first_key = blocks.config, blocks.first_block[None, rows]
    if not runs_on_triton(q):  # then scores of all keys that are given are in memory
        within = blocks.compressed_within_reach(rows)
        compressed = compressed[:, :, within.clamp(max=compressed.shape[2] - 1)]  # what is there twice nobody sees
        first_key = first_key - within[0]
    return block_importance_scores(
        q, compressed, first_key, blocks.position[:, rows], compress_length=config.compress_length,
        compress_stride=config.compress_stride, block_size=config.select_block, n_blocks=blocks.n_select,
        select_local=select_local, alibi_slopes=slopes,
    )  # fmt: skip
