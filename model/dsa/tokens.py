"""Where queries and keys stand, and which keys a query may see."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.kv_cache import Extension
from model.token_positions import TokenPositions, cached_positions, packed_positions
from model.visible_attention import Distance, View, Visible, alibi


@dataclass(frozen=True)
class Tokens:
    """Of one forward pass, alike in all layers. own_key: int64 (b or 1, n), index of each query's own token among the
    keys. first_key: int64 (b or 1, n), that of the first token of its document. n_keys: of all documents."""

    own_key: Tensor
    first_key: Tensor
    n_keys: int

    @property
    def position(self) -> Tensor:
        """int64 (b or 1, n), of each query in its document."""
        return self.own_key - self.first_key

    def visible(self) -> Visible:
        """Keys of the query's document that are not behind it. A function, and not a method: FlexAttention counts
        arguments."""
        own, first = self._by_query(self.own_key), self._by_query(self.first_key)

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j >= first(b, i)) & (j <= own(b, i))

        return visible

    def distance(self) -> Distance:
        """(b, i, j) -> tokens between query i and key j."""
        own = self._by_query(self.own_key)
        return lambda b, i, j: own(b, i) - j

    def _by_query(self, x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """(b, i) -> x of query i in row b."""
        if len(x) > 1:
            return lambda b, i: x[b, i]
        alike = x[0]
        return lambda b, i: alike[i]

    def dense_view(self, slopes: Tensor | None) -> View:
        """All that is visible."""
        return View(self.visible(), alibi(slopes, self.distance()), self.first_key, self.own_key)

    def chosen_view(self, slopes: Tensor | None, chosen: Tensor) -> View:
        """What is chosen. chosen: uint8 (B, n, keys / 8), bits, as `select_tokens` gives them."""

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (chosen[b, i, j >> 3] >> (j & 7)) & 1 != 0

        return View(visible, alibi(slopes, self.distance()), self.first_key, self.own_key)


def packed_tokens(n_tokens: int, cu_seqlens: Tensor | None, device: torch.device) -> Tokens:
    """Of a forward pass without a cache. cu_seqlens: as in `packed_positions`."""
    return _tokens(packed_positions(n_tokens, cu_seqlens, device))


def cached_tokens(extension: Extension) -> Tokens:
    """Of tokens that continue the rows of a cache."""
    return _tokens(cached_positions(extension))


def _tokens(positions: TokenPositions) -> Tokens:
    return Tokens(positions.own_key, positions.own_key - positions.position, positions.n_keys)
