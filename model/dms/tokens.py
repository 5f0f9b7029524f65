"""Where queries and keys stand, and which keys a query sees of those that are evicted behind a window."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from model.token_positions import TokenPositions
from model.visible_attention import View, alibi


@dataclass(frozen=True)
class DelayedKeys(TokenPositions):
    """Of one forward pass, alike in all layers.

    window: keys at a larger distance are there as their eviction says. number: int64 (b or 1, n), of each query's
    token, which noise is drawn by. flex: whether FlexAttention attends. dense: its block mask of all that is visible
    where training may ask for it, else None.
    """

    window: int
    number: Tensor
    flex: bool
    dense: BlockMask | None

    @property
    def decided(self) -> Tensor:
        """bool (keys,): those followed by another token of their document, which decides on them."""
        same = self.key_document[1:] == self.key_document[:-1]
        return torch.cat([same, same.new_zeros(1)])

    def weighed_view(self, log_kept: Tensor, slopes: Tensor | None) -> View:
        """All that is visible; log_kept, (B, H, keys), is added to the scores of keys beyond the window."""
        distance, window = self.distance(self.key_position), self.window
        positional = alibi(slopes, distance)

        def bias(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            added = torch.where(distance(b, i, j) > window, log_kept[b, h, j], 0.0)
            return added if positional is None else added + positional(b, h, i, j)

        return self.view_of(self.visible_keys(), bias)

    def kept_view(self, evicted: Tensor, slopes: Tensor | None) -> View:
        """What is visible and not gone. evicted: bool (B, H, keys)."""
        distance, window = self.distance(self.key_position), self.window
        causal = self.visible_keys()

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return causal(b, h, i, j) & ((distance(b, i, j) <= window) | ~evicted[b, h, j])

        return self.view_of(visible, alibi(slopes, distance))

    def last_query(self, evicted: Tensor) -> Tensor:
        """int64 (B, G, keys), the key that the last query stands at which sees a key: a key is seen by all tokens from
        its own up to there. evicted: bool (B, G, keys)."""
        key, end = torch.arange(self.n_keys, device=evicted.device), self.starts + self.lengths
        last = end[self.key_document] - 1
        return torch.where(evicted, torch.minimum(key + self.window, last), last)

    def keys_read(self, evicted: Tensor) -> Tensor:
        """int64 (B, G): pairs of a query and a key that it reads, where every key has its query."""
        key = torch.arange(self.n_keys, device=evicted.device)
        return (self.last_query(evicted) - key + 1).sum(-1)

    def tiles(self, evicted: Tensor, tile: int) -> Tensor:
        """bool (B, G, query tiles, key tiles): where a query of the tile reads a key of the tile."""
        n_tiles, queries = -(-self.n_keys // tile), -(-self.n_queries // tile)
        first = torch.arange(0, self.n_keys, tile, device=evicted.device)
        last = self.last_query(evicted)
        last = torch.nn.functional.pad(last, (0, n_tiles * tile - self.n_keys), value=-1)
        last = last.unflatten(-1, (n_tiles, tile)).amax(-1)[:, :, None]  # [B, G, 1, key tiles]
        row = torch.arange(queries, device=evicted.device) * tile
        start = self.own_key[:, None, row, None]  # [b, 1, query tiles, 1]
        stop = self.own_key[:, None, (row + tile - 1).clamp(max=self.n_queries - 1), None]
        return (first <= stop) & (last >= start)
