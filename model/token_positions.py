"""Where the queries and keys of one forward pass stand in their documents, alike in all layers of a sparse kind.

Positions count from the start of each document, and so do blocks of tokens: none straddles two documents, and packed
documents have the blocks that each would have alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.kv_cache import Extension
from model.visible_attention import Distance, View, Visible


@dataclass(frozen=True)
class TokenPositions:
    """Of one forward pass.

    position: int64 (b or 1, n), of each query in its document. own_key: int64 (b or 1, n), index of the query's own
    token among the keys. document: int64 (n,), of each query. key_position, key_document: int64 (keys,).
    starts, lengths: int64 (documents,), in keys. reach: as in `reached`.
    """

    position: Tensor
    own_key: Tensor
    document: Tensor
    key_position: Tensor
    key_document: Tensor
    starts: Tensor
    lengths: Tensor
    reach: int | None

    @property
    def n_queries(self) -> int:
        return self.position.shape[1]

    @property
    def n_keys(self) -> int:
        return len(self.key_position)

    def distance(self, to: Tensor) -> Distance:
        """(b, i, j) -> tokens between query i and what stands at position to[j] of its document."""
        alike = len(self.position) == 1
        query = self.position[0] if alike else self.position

        def distance(b: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (query[i] if alike else query[b, i]) - to[j]

        return distance

    def visible_keys(self) -> Visible:
        """Keys of the query's document that are not behind it. A function, and not a method: FlexAttention counts
        arguments."""
        distance = self.distance(self.key_position)

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (self.document[i] == self.key_document[j]) & (distance(b, i, j) >= 0)

        return visible

    def view_of(self, visible: Visible, bias: Visible | None) -> View:
        """Of queries that see keys of their document up to themselves, or some of these."""
        return View(visible, bias, self.own_key - self.position, self.own_key, self.reach)


def packed_positions(n_tokens: int, cu_seqlens: Tensor | None, max_seqlen: int, device: torch.device) -> TokenPositions:
    """Of a forward pass without a cache. cu_seqlens: int32 (documents + 1,), which may be empty ones, or None for one
    document a row. max_seqlen: an upper bound of the documents' lengths."""
    reach = n_tokens if cu_seqlens is None else min(max_seqlen, n_tokens)
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, n_tokens], device=device)
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    token = torch.arange(n_tokens, device=device)
    document = torch.searchsorted(cu_seqlens, token, right=True) - 1
    position = token - starts[document]
    return TokenPositions(position[None], token[None], document, position, document, starts, lengths, reach)


def cached_positions(extension: Extension) -> TokenPositions:
    """Of tokens that continue the rows of a cache, each row one document whose token t is key t."""
    n_keys, device = extension.keys.stop - extension.keys.start, extension.position.device
    none = torch.zeros(extension.position.shape[1], dtype=torch.int64, device=device)
    key = torch.arange(n_keys, device=device)
    starts, lengths = none[:1], none[:1] + n_keys
    return TokenPositions(
        extension.position, extension.key_index, none, key, torch.zeros_like(key), starts, lengths, None
    )
