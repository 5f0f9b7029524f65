"""Which blocks each query selects: equations 8 to 12 of arXiv:2502.11089."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from model.nsa.blocks import Blocks
from model.visible_attention import SCORES_AT_ONCE


@torch.no_grad()
def select_blocks(q: Tensor, compressed: Tensor, blocks: Blocks, slopes: Tensor | None) -> Tensor:
    """The same for all query heads of a group; without gradient, since choosing has none.

    Scores are sums over the group's heads of the compression branch's weights, each divided among the blocks that its
    tokens lie in. The first block and the last select_local ones up to the query's own are always among the chosen.

    Args:
        q: (B, H, n, D). compressed: compressed keys (B, G, C, D). slopes: as in AttentionMetadata.

    Returns: int64 (B, G, n, count), counted from the start of each query's document, -1 where it has no more blocks.
    """
    rows = max(1, SCORES_AT_ONCE[q.device.type] // (q.shape[0] * q.shape[1] * compressed.shape[2]))
    with torch.autocast(q.device.type, enabled=False):
        parts = [
            _choose(block_scores(q[:, :, part], compressed, blocks, part, slopes), blocks, part)
            for part in torch.arange(q.shape[2], device=q.device).split(rows)
        ]
    return torch.cat(parts, dim=2)


def block_scores(q: Tensor, compressed: Tensor, blocks: Blocks, rows: Tensor, slopes: Tensor | None) -> Tensor:
    """float32 (float64 for such q) (B, G, rows, n_select), of the queries `rows`, int64 (rows,), which q holds."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    groups = compressed.shape[1]
    grouped = q.to(dtype).unflatten(1, (groups, -1))  # [B, G, H / G, rows, D]
    scores = grouped @ compressed.to(dtype)[:, :, None].mT * q.shape[-1] ** -0.5  # [B, G, H / G, rows, C]
    b, i = torch.arange(len(blocks.position), device=q.device).view(-1, 1, 1, 1, 1), rows[:, None]
    block = torch.arange(compressed.shape[2], device=q.device)
    if slopes is not None:
        distance = blocks.distance(blocks.last_position)(b, i, block)  # [rows, C], or [B, 1, 1, rows, C]
        scores = scores - slopes.to(dtype).view(groups, -1, 1, 1) * distance
    visible = blocks.sees_compressed()(b, b, i, block)
    scores = scores.masked_fill(~visible, torch.finfo(dtype).min)
    weights = (scores.softmax(-1) * visible).sum(2)  # [B, G, rows, C]; rows that see no block have none
    return _by_overlap(weights, blocks, rows)


def _by_overlap(weights: Tensor, blocks: Blocks, rows: Tensor) -> Tensor:
    """Equation 9 the right way round: block j gets the weights of all compressed blocks that share tokens with it,
    times the number of strides they share (1 2 2 2 1 at 32, 16, 64). weights: (B, G, rows, C)."""
    length, stride, size = blocks.config.compress_length, blocks.config.compress_stride, blocks.config.select_block
    before, count = length // stride - 1, (size + length) // stride - 1
    padded = pad(weights, (before, 1))  # behind `before` zeros; the last column is zero, for blocks beyond
    # other documents' blocks have no weight, and need no mask
    first = blocks.first_block[rows][:, None] + torch.arange(blocks.n_select, device=weights.device) * (size // stride)
    scores = torch.zeros(*weights.shape[:3], blocks.n_select, dtype=weights.dtype, device=weights.device)
    for k in range(count):
        start = (k - before) * stride  # of the compressed block, counted from the start of block j
        shared = (min(start + length, size) - max(start, 0)) // stride
        index = (first + k).clamp(max=padded.shape[-1] - 1)
        scores += shared * padded.gather(-1, index.expand(*weights.shape[:2], -1, -1))
    return scores


def _choose(scores: Tensor, blocks: Blocks, rows: Tensor) -> Tensor:
    """scores: as `block_scores` gives them. Returns what `select_blocks` does, of these rows."""
    own = (blocks.position[:, rows] // blocks.config.select_block)[:, None, :, None]  # [b or 1, 1, rows, 1]
    block = torch.arange(blocks.n_select, device=scores.device)
    always = (block == 0) | (block > own - blocks.config.select_local)
    scores = scores.masked_fill(always, torch.inf).masked_fill(block > own, -torch.inf)
    best = scores.topk(min(blocks.config.select_count, blocks.n_select))
    return best.indices.where(best.values > -torch.inf, -1)
