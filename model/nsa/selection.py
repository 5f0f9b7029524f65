"""Which blocks each query selects: equations 8 to 12 of arXiv:2502.11089."""

import torch
from torch import Tensor
from torch.nn.functional import pad

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
    batch, heads, n, _ = q.shape
    stride = blocks.config.compress_stride
    with torch.autocast(q.device.type, enabled=False):
        parts = [
            _choose(block_scores(q[:, :, rows], compressed, blocks, rows, slopes), blocks, rows)
            for rows in blocks_of_rows(n, compressed.shape[2], blocks.reach, batch * heads, q.device, stride)
        ]
    return torch.cat(parts, dim=2)


def block_scores(q: Tensor, compressed: Tensor, blocks: Blocks, rows: slice, slopes: Tensor | None) -> Tensor:
    """float32 (float64 for such q) (B, G, rows, n_select), of the queries `rows`, which q holds."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    groups, last = compressed.shape[1], compressed.shape[2] - 1
    within = blocks.compressed_within_reach(rows)  # [W]
    block = within.clamp(max=last)
    grouped = q.to(dtype).unflatten(1, (groups, -1))  # [B, G, H / G, rows, D]
    scores = grouped @ compressed[:, :, None, block].to(dtype).mT * q.shape[-1] ** -0.5  # [B, G, H / G, rows, W]
    b = torch.arange(len(blocks.position), device=q.device).view(-1, 1, 1, 1, 1)
    i = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
    if slopes is not None:
        distance = blocks.distance(blocks.last_position)(b, i, block)  # [rows, W], or [B, 1, 1, rows, W]
        scores = scores - slopes.to(dtype).view(groups, -1, 1, 1) * distance
    visible = blocks.sees_compressed()(b, b, i, block) & (within <= last)
    scores = scores.masked_fill(~visible, torch.finfo(dtype).min)
    weights = (scores.softmax(-1) * visible).sum(2)  # [B, G, rows, W]; rows that see no block have none
    return _by_overlap(weights, blocks, rows, within[0])


def _by_overlap(weights: Tensor, blocks: Blocks, rows: slice, from_block: Tensor) -> Tensor:
    """Equation 9 the right way round: block j gets the weights of all compressed blocks that share tokens with it,
    times the number of strides they share (1 2 2 2 1 at 32, 16, 64).

    Args:
        weights: (B, G, rows, W), of the compressed blocks from `from_block`, int64 (), on.
    """
    length, stride, size = blocks.config.compress_length, blocks.config.compress_stride, blocks.config.select_block
    before, count = length // stride - 1, (size + length) // stride - 1
    # tokens that block 0 shares with the compressed blocks around it, of which the first begin before it
    starts = (torch.arange(count, device=weights.device) - before) * stride
    shared = ((starts + length).clamp(max=size) - starts.clamp(min=0)) // stride
    padded = pad(weights, (before, 1))  # behind `before` zeros; the last column is zero, for blocks beyond
    # other documents' blocks have no weight, and need no mask
    around = torch.arange((blocks.n_select - 1) * (size // stride) + count, device=weights.device)
    index = ((blocks.first_block[rows] - from_block)[:, None] + around).clamp(max=padded.shape[-1] - 1)
    own = padded.gather(-1, index.expand(*weights.shape[:2], -1, -1))  # [B, G, rows, around]
    return (own.unfold(-1, count, size // stride) * shared).sum(-1)


def _choose(scores: Tensor, blocks: Blocks, rows: slice) -> Tensor:
    """scores: as `block_scores` gives them. Returns what `select_blocks` does, of these rows."""
    own = (blocks.position[:, rows] // blocks.config.select_block)[:, None, :, None]  # [b or 1, 1, rows, 1]
    block = torch.arange(blocks.n_select, device=scores.device)
    always = (block == 0) | (block > own - blocks.config.select_local)
    scores = scores.masked_fill(always, torch.inf).masked_fill(block > own, -torch.inf)
    best = scores.topk(min(blocks.config.select_count, blocks.n_select))
    return best.indices.where(best.values > -torch.inf, -1)
