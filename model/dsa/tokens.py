"""Where queries and keys stand, and which keys a query may see."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from model.kv_cache import Extension
from model.token_positions import TokenPositions, cached_positions, packed_positions
from model.visible_attention import View, Visible, alibi


@dataclass(frozen=True)
class Tokens(TokenPositions):
    """Of one forward pass, alike in all layers."""

    @cached_property
    def first_key(self) -> Tensor:
        """int64 (b or 1, n), index of the first token of each query's document among the keys."""
        return self.own_key - self.position

    def view(self, slopes: Tensor | None, chosen: Tensor | None = None) -> View:
        """All that is visible, or what is chosen of it. chosen: uint8 (B, n, keys / 8), bits, as `select_tokens` gives
        them."""
        if chosen is None:
            return self.view_of(self.visible_keys(), self._bias(slopes))

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            bit = (j & 7).to(torch.uint8)  # int64 would make int64 of what is shifted
            return (chosen[b, i, j >> 3] >> bit) & 1 != 0

        return self.view_of(visible, self._bias(slopes))

    def _bias(self, slopes: Tensor | None) -> Visible | None:
        return alibi(slopes, self.distance(self.key_position))


def packed_tokens(n_tokens: int, cu_seqlens: Tensor | None, max_seqlen: int, device: torch.device) -> Tokens:
    """Of a forward pass without a cache. cu_seqlens, max_seqlen: as in `packed_positions`."""
    return Tokens(**vars(packed_positions(n_tokens, cu_seqlens, max_seqlen, device)))


def cached_tokens(extension: Extension) -> Tokens:
    """Of tokens that continue the rows of a cache."""
    return Tokens(**vars(cached_positions(extension)))
