"""Block-Sparse FlashAttention (Ohayon et al. 2025, arXiv:2512.07011) in PyTorch: its definition, and the CPU path.

Queries are taken in blocks of QUERY_BLOCK positions, keys in blocks of KEY_BLOCK. Block (i, j) is kept where its
largest score exceeds the threshold of its head and query block, or where it is diagonal: holds keys at the positions of
the queries. Or the kept blocks are given, without a diagonal of their own and also in blocks of QUERY_BLOCKS positions.
Attention is softmax over the keys of kept blocks; scores are exact.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.common.autocast import outside_autocast

QUERY_BLOCK, KEY_BLOCK = 128, 64  # of the paper's released code
QUERY_BLOCKS = (QUERY_BLOCK, 64)  # that kept blocks may be given in


@dataclass(frozen=True)
class QueryBlock:
    """Queries whose positions lie in one block. The last query stands at the last key.

    index: the positions are size * index and on (below 0 where there are more queries than keys). rows: of the queries.
    position: of the first of them. diagonal: key blocks that hold positions of the block, which thresholds always keep.
    seen: key blocks that any of the queries sees are 0 ... seen - 1.
    """

    index: int
    rows: slice
    position: int
    diagonal: slice
    seen: int


def query_blocks(n_queries: int, n_keys: int, causal: bool, size: int = QUERY_BLOCK) -> list[QueryBlock]:
    """All blocks of queries, in order, each `size` positions. Empty without queries."""
    offset, blocks = n_keys - n_queries, []
    for index in range(offset // size, -(-n_keys // size)):
        start = max(index * size, offset)
        stop = min((index + 1) * size, n_keys)
        if stop <= start:
            continue
        seen = max(-(-(stop if causal else n_keys) // KEY_BLOCK), 0)
        diagonal = slice(max(index * size, 0) // KEY_BLOCK, max(-(-stop // KEY_BLOCK), 0))
        blocks.append(QueryBlock(index, slice(start - offset, stop - offset), start, diagonal, seen))
    return blocks


def grid_of_blocks(n_queries: int, n_keys: int, size: int) -> tuple[int, int]:
    """How many blocks of queries, each `size` positions, and how many of keys."""
    n_blocks = -(-n_keys // size) - (n_keys - n_queries) // size if n_queries else 0
    return n_blocks, -(-n_keys // KEY_BLOCK)


def visible_blocks(
    n_queries: int, n_keys: int, causal: bool, device: torch.device | str = "cpu", size: int = QUERY_BLOCK
) -> Tensor:
    """bool (query blocks, key blocks), as in BlockSparseStats."""
    n_blocks, n_key_blocks = grid_of_blocks(n_queries, n_keys, size)
    stop = (torch.arange(1, n_blocks + 1, device=device) + (n_keys - n_queries) // size) * size
    key = torch.arange(n_key_blocks, device=device) * KEY_BLOCK
    return key < (stop[:, None] if causal else torch.full_like(stop, n_keys)[:, None])


def diagonal_blocks(n_queries: int, n_keys: int, causal: bool, device: torch.device | str = "cpu") -> Tensor:
    """bool, as visible_blocks: those that are always kept."""
    visible = visible_blocks(n_queries, n_keys, causal, device)
    index = (n_keys - n_queries) // QUERY_BLOCK + torch.arange(len(visible), device=device)
    key_block = torch.arange(visible.shape[1], device=device)
    return visible & (key_block * KEY_BLOCK // QUERY_BLOCK == index[:, None])


def block_thresholds(thresholds: Tensor, block: QueryBlock) -> Tensor:
    """(H,) of one block of queries: positions past the last threshold reuse it. thresholds: (H, P)."""
    return thresholds[:, min(max(block.index, 0), thresholds.shape[1] - 1)]


def kept_blocks(maxima: Tensor, thresholds: Tensor, block: QueryBlock) -> Tensor:
    """bool (..., H, block.seen): which blocks of keys one block of queries keeps. maxima: (..., H, block.seen), the
    largest scores; a NaN is kept, and spoils its rows. thresholds: (H, P)."""
    limit = block_thresholds(thresholds, block)[:, None]
    keep = ~(maxima <= limit) | (limit == -torch.inf)
    keep[..., block.diagonal] = True
    return keep


@outside_autocast
def block_scores(
    q: Tensor, k: Tensor, block: QueryBlock, *, scale: float, causal: bool, alibi_slopes: Tensor | None
) -> Tensor:
    """Scores of one block of queries over the keys of the blocks it sees, -inf where a query does not see a key.

    q: (B, R, Tq, D), k: (B, 1, Tk, D): the query heads of one key/value head. alibi_slopes: (R,). Returns (B, R, rows,
    keys) in float32 (float64 for float64 inputs), the products of the inputs as they are.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    n_keys = min(block.seen * KEY_BLOCK, k.shape[2])
    scores = (q[:, :, block.rows].to(dtype) @ k[:, :, :n_keys].to(dtype).mT) * scale
    position = torch.arange(block.position, block.position + scores.shape[2], device=q.device)[:, None]
    distance = position - torch.arange(n_keys, device=q.device)
    if alibi_slopes is not None:
        scores -= alibi_slopes.to(dtype)[:, None, None] * distance
    return scores.masked_fill_(distance < 0, -torch.inf) if causal else scores


def maxima_of_blocks(scores: Tensor) -> Tensor:
    """(..., rows, keys) -> (..., key blocks): the largest score of each block, of keys that are there."""
    padded = torch.nn.functional.pad(scores, (0, -scores.shape[-1] % KEY_BLOCK), value=-torch.inf)
    return padded.unflatten(-1, (-1, KEY_BLOCK)).amax((-3, -1))


def block_maxima(
    q: Tensor, k: Tensor, *, scale: float | None = None, causal: bool = True, alibi_slopes: Tensor | None = None
) -> Iterator[tuple[QueryBlock, Tensor]]:
    """What thresholds are compared with: for each block of queries, the largest score of each block of keys it sees.

    Arguments as in `block_sparse_softmax_attention`. Yields (block, (B, H, block.seen)), float32; memory is that of the
    scores of one block of queries of one key/value head.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    for block in query_blocks(q.shape[2], k.shape[2], causal):
        parts = [
            maxima_of_blocks(
                block_scores(q[:, heads], k[:, g : g + 1], block, scale=scale, causal=causal, alibi_slopes=slopes)
            )
            for g, heads, slopes in _groups(q, k, alibi_slopes)
        ]
        yield block, torch.cat(parts, 1)


def _groups(q: Tensor, k: Tensor, alibi_slopes: Tensor | None) -> Iterator[tuple[int, slice, Tensor | None]]:
    """Key/value heads, each with its query heads and their slopes."""
    repeat = q.shape[1] // k.shape[1]
    for g in range(k.shape[1]):
        heads = slice(g * repeat, (g + 1) * repeat)
        yield g, heads, None if alibi_slopes is None else alibi_slopes[heads]


@outside_autocast
def block_sparse_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thresholds: Tensor | None,
    blocks: Tensor | None,
    query_block: int,
    scale: float,
    causal: bool,
    alibi_slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Arguments as in `block_sparse_softmax_attention`; nothing is checked here.

    Returns: out (B, H, Tq, D); kept: bool (B, H, query blocks, key blocks), as in BlockSparseStats.
    """
    out = torch.zeros_like(q)
    grid = (*q.shape[:2], *grid_of_blocks(q.shape[2], k.shape[2], query_block))
    kept = torch.zeros(grid, dtype=torch.bool, device=q.device)
    given = torch.ones_like(kept) if blocks is None else blocks.expand(grid)
    for g, heads, slopes in _groups(q, k, alibi_slopes):
        for i, block in enumerate(query_blocks(q.shape[2], k.shape[2], causal, query_block)):
            if block.seen == 0:
                continue
            scores = block_scores(q[:, heads], k[:, g : g + 1], block, scale=scale, causal=causal, alibi_slopes=slopes)
            keep = given[:, heads, i, : block.seen]  # [B, R, key blocks]
            if thresholds is not None:
                keep = kept_blocks(maxima_of_blocks(scores), thresholds[heads], block)
            kept[:, heads, i, : block.seen] = keep
            gate = keep.repeat_interleave(KEY_BLOCK, -1)[..., : scores.shape[-1]]  # [B, R, keys]
            scores.masked_fill_(~gate[..., None, :], -torch.inf)
            top = scores.amax(-1, keepdim=True)
            p = (scores - torch.where(top == -torch.inf, 0, top)).exp()
            total = p.sum(-1, keepdim=True)
            p /= torch.where(total == 0, 1, total)
            # values of other blocks stay unread: weight 0 would let their NaN pass
            values = v[:, g : g + 1, : scores.shape[-1]].to(p.dtype).where(gate[..., None], 0)
            out[:, heads, block.rows] = (p @ values).to(out.dtype)
    return out, kept
