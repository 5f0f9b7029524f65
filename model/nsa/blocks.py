"""Which blocks of keys there are, and which of them each branch lets a query see.

Compressed block i of a document stands for its tokens i * stride ... i * stride + length - 1, block j of those that are
selected is its tokens j * select_block ... The tail of a document that fills no compressed block has none. Compressed
blocks of all documents stand one behind the other, in as many places as there can be at most (tokens / stride): shapes
do not depend on where documents end.

What is visible is said once, in functions (b, h, i, j) -> bool tensor of batch row, query head, query and key (or
compressed block), as FlexAttention takes them; the masks of the other path are their values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.kv_cache import Extension
from model.nsa.config import NSAConfig
from model.token_positions import TokenPositions, cached_positions, packed_positions
from model.visible_attention import Visible


@dataclass(frozen=True)
class Blocks(TokenPositions):
    """Of one forward pass, alike in all layers.

    config: sizes. first_key: int64 (C,), index of the first token of each compressed block (some token where there is
    no such block). last_position: int64 (C,), position of its last token. block_document: int64 (C,), -1 where there is
    no such block. first_block: int64 (n,), the first compressed block of each query's document. n_select: blocks to
    select from, of the longest document.
    """

    config: NSAConfig
    first_key: Tensor
    last_position: Tensor
    block_document: Tensor
    first_block: Tensor
    n_select: int

    def compressed_tokens(self) -> Tensor:
        """int64 (C, compress_length), indices of the tokens of each compressed block."""
        offset = torch.arange(self.config.compress_length, device=self.first_key.device)
        return (self.first_key[:, None] + offset).clamp(max=self.n_keys - 1)

    def compressed_within_reach(self, rows: slice) -> Tensor:
        """int64 (W,), indices among which are all compressed blocks that the queries `rows` see, without asking the
        device. Some lie behind the last one."""
        width = len(self.first_key)
        if self.reach is None:
            return torch.arange(width, device=self.first_key.device)
        stride = self.config.compress_stride  # each block takes as many tokens of its document, and the first one more
        width = max(1, min(width, (rows.stop - rows.start + self.reach) // stride, rows.stop // stride))
        return self.first_block[rows.start] + torch.arange(width, device=self.first_key.device)

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

    def sees_selected(self, chosen: Tensor, heads_per_group: int) -> Visible:
        """Tokens of selected blocks, up to the query. chosen: int64 (B, G, n, count), of the query's document, -1 for
        none."""
        selected = torch.zeros(*chosen.shape[:3], self.n_select + 1, dtype=torch.bool, device=chosen.device)
        selected.scatter_(-1, chosen.where(chosen >= 0, self.n_select), True)
        distance, block = self.distance(self.key_position), self.key_position // self.config.select_block

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            seen = (self.document[i] == self.key_document[j]) & (distance(b, i, j) >= 0)
            return seen & selected[b, h // heads_per_group, i, block[j]]

        return visible

    def selected_first_keys(self, chosen: Tensor) -> Tensor:
        """int32 (B, G, n, count), the first token of each selected block, -1 for none. chosen: as above."""
        start = (self.own_key - self.position)[:, None, :, None]
        return (start + chosen * self.config.select_block).where(chosen >= 0, -1).int()

    @property
    def n_selectable(self) -> int:
        """No fewer than there are blocks to select in all documents of a row."""
        return self.n_keys // self.config.select_block + len(self.starts)


def packed_blocks(
    config: NSAConfig, n_tokens: int, cu_seqlens: Tensor | None, max_seqlen: int, device: torch.device
) -> Blocks:
    """Of a forward pass without a cache. cu_seqlens, max_seqlen: as in `packed_positions`."""
    tokens = packed_positions(n_tokens, cu_seqlens, max_seqlen, device)
    return _blocks(config, tokens, n_tokens if tokens.reach is None else tokens.reach)


def cached_blocks(config: NSAConfig, extension: Extension) -> Blocks:
    """Of tokens that continue the rows of a cache. Compressed blocks that a row has not filled yet lie behind its
    queries."""
    tokens = cached_positions(extension)
    return _blocks(config, tokens, tokens.n_keys)


def _blocks(config: NSAConfig, tokens: TokenPositions, longest: int) -> Blocks:
    """longest: upper bound of the documents' lengths."""
    stride, length, starts = config.compress_stride, config.compress_length, tokens.starts
    counts = torch.where(tokens.lengths < length, 0, (tokens.lengths - length) // stride + 1)
    ends = counts.cumsum(0)
    place = torch.arange(max(1, tokens.n_keys // stride), device=starts.device)  # none would leave phi unused
    of = torch.searchsorted(ends, place, right=True)
    real = of < len(starts)
    of = of.clamp(max=len(starts) - 1)
    first_position = torch.where(real, place - (ends - counts)[of], 0) * stride
    return Blocks(
        **vars(tokens), config=config,
        first_key=torch.where(real, starts[of] + first_position, 0), last_position=first_position + length - 1,
        block_document=torch.where(real, of, -1), first_block=(ends - counts)[tokens.document],
        n_select=-(-longest // config.select_block),
    )  # fmt: skip
