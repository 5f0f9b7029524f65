"""Where queries, keys and blocks stand, and which of them each branch lets a query see.

Positions count from the start of each document, and so do blocks: compressed block i of a document stands for its
tokens i * stride ... i * stride + length - 1, block j of those that are selected is its tokens j * select_block ... So
no block straddles two documents, packed documents have the blocks that each would have alone, and the tail of a
document that fills no compressed block has none. Compressed blocks of all documents stand one behind the other, in as
many places as there can be at most (tokens / stride): shapes do not depend on where documents end.

What is visible is said once, in functions (b, h, i, j) -> bool tensor of batch row, query head, query and key (or
compressed block), as FlexAttention takes them; the masks of the other path are their values.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.kv_cache import Extension
from model.nsa.config import NSAConfig
from model.visible_attention import Visible


@dataclass(frozen=True)
class Blocks:
    """Of one forward pass, alike in all layers.

    config: sizes. position: int64 (b or 1, n), of each query in its document. own_key: int64 (b or 1, n), index of the
    query's own token among the keys. document: int64 (n,), of each query. key_position, key_document: int64 (keys,).
    first_key: int64 (C,), index of the first token of each compressed block (some token where there is no such block).
    last_position: int64 (C,), position of its last token. block_document: int64 (C,), -1 where there is no such block.
    first_block: int64 (n,), the first compressed block of each query's document. n_select: blocks to select from, of
    the longest document.
    """

    config: NSAConfig
    position: Tensor
    own_key: Tensor
    document: Tensor
    key_position: Tensor
    key_document: Tensor
    first_key: Tensor
    last_position: Tensor
    block_document: Tensor
    first_block: Tensor
    n_select: int

    @property
    def n_keys(self) -> int:
        return len(self.key_position)

    def compressed_tokens(self) -> Tensor:
        """int64 (C, compress_length), indices of the tokens of each compressed block."""
        offset = torch.arange(self.config.compress_length, device=self.first_key.device)
        return (self.first_key[:, None] + offset).clamp(max=self.n_keys - 1)

    def distance(self, to: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """(b, i, j) -> tokens between query i and what stands at position to[j]; to: key_position or last_position."""
        alike = len(self.position) == 1
        query = self.position[0] if alike else self.position

        def distance(b: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (query[i] if alike else query[b, i]) - to[j]

        return distance

    def sees_compressed(self) -> Visible:
        """Compressed blocks whose last token is the query or stands before it."""
        distance = self.distance(self.last_position)

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (self.document[i] == self.block_document[j]) & (distance(b, i, j) >= 0)

        return visible

    def sees_window(self) -> Visible:
        """The last `window` tokens."""
        distance, window = self.distance(self.key_position), self.config.window

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            apart = distance(b, i, j)
            return (self.document[i] == self.key_document[j]) & (apart >= 0) & (apart < window)

        return visible

    def sees_selected(self, selected: Tensor, heads_per_group: int) -> Visible:
        """Tokens of selected blocks, up to the query. selected: bool (B, G, n, n_select)."""
        distance, block = self.distance(self.key_position), self.key_position // self.config.select_block

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            seen = (self.document[i] == self.key_document[j]) & (distance(b, i, j) >= 0)
            return seen & selected[b, h // heads_per_group, i, block[j]]

        return visible


def packed_blocks(
    config: NSAConfig, n_tokens: int, cu_seqlens: Tensor | None, max_seqlen: int, device: torch.device
) -> Blocks:
    """Of a forward pass without a cache.

    Args:
        cu_seqlens: int32 (documents + 1,), which may be empty ones, or None for one document a row.
        max_seqlen: an upper bound of the documents' lengths.
    """
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, n_tokens], device=device)
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    token = torch.arange(n_tokens, device=device)
    document = torch.searchsorted(cu_seqlens, token, right=True) - 1
    position = token - starts[document]
    longest = min(max_seqlen, n_tokens)
    return _blocks(config, position[None], token[None], document, position, document, starts, lengths, longest)


def cached_blocks(config: NSAConfig, extension: Extension) -> Blocks:
    """Of tokens that continue the rows of a cache, each row one document whose token t is key t. Compressed blocks that
    a row has not filled yet lie behind its queries."""
    position = extension.position
    n_keys, device = extension.keys.stop - extension.keys.start, position.device
    none = torch.zeros(position.shape[1], dtype=torch.int64, device=device)
    key = torch.arange(n_keys, device=device)
    starts, lengths = none[:1], none[:1] + n_keys
    return _blocks(config, position, extension.key_index, none, key, torch.zeros_like(key), starts, lengths, n_keys)


def _blocks(
    config: NSAConfig, position: Tensor, own_key: Tensor, document: Tensor, key_position: Tensor, key_document: Tensor,
    starts: Tensor, lengths: Tensor, longest: int,
) -> Blocks:  # fmt: skip
    """starts, lengths: int64 (documents,), in keys. longest: upper bound of lengths."""
    stride, length = config.compress_stride, config.compress_length
    counts = torch.where(lengths < length, 0, (lengths - length) // stride + 1)
    ends = counts.cumsum(0)
    place = torch.arange(max(1, len(key_position) // stride), device=position.device)  # none would leave phi unused
    of = torch.searchsorted(ends, place, right=True)
    real = of < len(starts)
    of = of.clamp(max=len(starts) - 1)
    first_position = torch.where(real, place - (ends - counts)[of], 0) * stride
    return Blocks(
        config, position, own_key, document, key_position, key_document,
        first_key=torch.where(real, starts[of] + first_position, 0), last_position=first_position + length - 1,
        block_document=torch.where(real, of, -1), first_block=(ends - counts)[document],
        n_select=-(-longest // config.select_block),
    )  # fmt: skip
