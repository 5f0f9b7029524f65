"""What policies that choose by blocks or by share of weight have in common. Query blocks count from the first query of
the forward pass, key blocks from the first key."""

import torch
from torch import Tensor

from model.policies.policy import SequenceView


def in_blocks(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """x: (heads, n, D) -> float32 (heads, blocks, size, D), padded with zeros, and float32 (blocks,), how many of each
    block are not padding."""
    n = x.shape[1]
    blocks = torch.nn.functional.pad(x.float(), (0, 0, 0, -n % size)).unflatten(1, (-1, size))
    counts = (n - torch.arange(0, n, size, device=x.device)).clamp(max=size).float()
    return blocks, counts


def block_means(x: Tensor, size: int) -> Tensor:
    """(heads, n, D) -> float32 (heads, blocks, D)."""
    blocks, counts = in_blocks(x, size)
    return blocks.sum(2) / counts[:, None]


def block_edges(n: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 (blocks,) twice: the first and the last index of each block of 0 ... n - 1."""
    first = torch.arange(0, n, size, device=device)
    return first, (first + size - 1).clamp(max=n - 1)


def visible_blocks(
    view: SequenceView, sizes: tuple[int, int], lengths: tuple[int, int], device: torch.device
) -> Tensor:
    """Bool (query blocks, key blocks): some query of the one sees some key of the other. sizes, lengths: of query and
    key blocks, numbers of queries and keys."""
    (first, last), (start, end) = (block_edges(n, size, device) for n, size in zip(lengths, sizes, strict=True))
    seen = (last + view.query_start)[:, None] >= start
    return seen if view.window is None else seen & ((first + view.query_start)[:, None] - end < view.window)


def own_blocks(view: SequenceView, sizes: tuple[int, int], lengths: tuple[int, int], device: torch.device) -> Tensor:
    """Bool (query blocks, key blocks): the key blocks in which the queries themselves stand."""
    (first, last), (start, end) = (block_edges(n, size, device) for n, size in zip(lengths, sizes, strict=True))
    return ((last + view.query_start)[:, None] >= start) & ((first + view.query_start)[:, None] <= end)


def mean_scores(q: Tensor, k: Tensor, view: SequenceView, sizes: tuple[int, int]) -> Tensor:
    """Scores of the blocks' mean queries and mean keys with the bias at their mean distance (0 on the diagonal),
    float32 (H, query blocks, key blocks); -inf where not visible."""
    mean_q, mean_k = (block_means(x, size) for x, size in zip((q, k), sizes, strict=True))
    return scores_of_means(mean_q, mean_k, view, sizes, (q.shape[1], k.shape[1]))


def scores_of_means(
    mean_q: Tensor, mean_k: Tensor, view: SequenceView, sizes: tuple[int, int], lengths: tuple[int, int]
) -> Tensor:
    """As mean_scores. mean_q: float32 (H, query blocks, D), mean_k: float32 (G, key blocks, D)."""
    device = mean_q.device
    scores = (mean_q.unflatten(0, (len(mean_k), -1)) @ mean_k[:, None].transpose(-1, -2)).flatten(0, 1) * view.scale
    if view.alibi_slopes is not None:
        (first, last), (start, end) = (block_edges(n, size, device) for n, size in zip(lengths, sizes, strict=True))
        distance = ((first + last) / 2 + view.query_start)[:, None] - (start + end) / 2
        scores -= view.alibi_slopes[:, None, None] * distance.clamp(min=0)
    return scores.masked_fill_(~visible_blocks(view, sizes, lengths, device), -torch.inf)


def top_share(p: Tensor, share: float) -> Tensor:
    """Bool, like p: the largest entries of the last dimension until they sum to `share`; all from share 1 on, whatever
    rounding does to the sum. p: non-negative."""
    if share >= 1:
        return torch.ones_like(p, dtype=torch.bool)
    values, places = p.sort(dim=-1, descending=True, stable=True)
    before = values.cumsum(-1) - values
    return torch.zeros_like(p, dtype=torch.bool).scatter_(-1, places, before < share)


def top_count(x: Tensor, count: int | Tensor) -> Tensor:
    """Bool, like x: the `count` largest entries of the last dimension. count: a number, or int64 like x without it."""
    if isinstance(count, int) and count >= x.shape[-1]:
        return torch.ones_like(x, dtype=torch.bool)
    rank = x.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return rank < (count if isinstance(count, int) else count[..., None])


def line_weights(p: Tensor) -> tuple[Tensor, Tensor]:
    """What vertical and slash lines hold of the attention of the last queries: float32 (H, keys) twice, by key and by
    distance from query to key. p: weights of queries that end with the last key, (H, rows, keys)."""
    heads, rows, n_keys = p.shape
    query = torch.arange(n_keys - rows, n_keys, device=p.device)
    distance = query[:, None] - torch.arange(n_keys, device=p.device)
    flat = distance.clamp(min=0).flatten().expand(heads, -1)  # keys after the query have no weight to add
    return p.sum(1), torch.zeros(heads, n_keys, device=p.device).scatter_add_(1, flat, p.flatten(1))


def last_weights(q: Tensor, k: Tensor, view: SequenceView, rows: int) -> Tensor:
    """Exact attention weights of the last `rows` queries (all where there are fewer), float32 (H, rows, keys)."""
    n_queries = q.shape[1]
    return torch.softmax(view.scores(q, k, slice(max(0, n_queries - rows), n_queries), k.shape[1]), -1)


def check_share(**values: float) -> None:
    """Raises ValueError for a value that is no share in (0, 1]."""
    for name, value in values.items():
        if not 0 < value <= 1:
            raise ValueError(f"{name} is {value}: expected a share in (0, 1]; 1 keeps everything")


def check_least(least: int, **values: int) -> None:
    """Raises ValueError for what is no integer, or below `least`."""
    for name, value in values.items():
        if not isinstance(value, int):
            raise ValueError(f"{name} is {value}: expected an integer of at least {least}")
        if value < least:
            raise ValueError(f"{name} is {value}: expected at least {least}")
