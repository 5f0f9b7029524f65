"""Where blocks of tokens stand, and their summaries.

Blocks of all documents stand one behind the other, in as many places as there can be at most (keys / block, and one
more a document): shapes do not depend on where documents end.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from model.hierarchical.config import HierarchicalConfig
from model.kv_cache import Extension
from model.token_positions import TokenPositions, cached_positions, packed_positions
from model.visible_attention import View, alibi


@dataclass(frozen=True)
class Blocks(TokenPositions):
    """Of one forward pass, alike in all layers.

    size: tokens of a block. first_key, last_key: int64 (C,), index of the first and of the last token of each block
    (some token where there is no such block). last_position: int64 (C,), the position of a full block's last token.
    first_block, own_block: int64 (b or 1, n), the first block of each query's document, and its own.
    key_block: int64 (keys,), the block of each key.
    """

    size: int
    first_key: Tensor
    last_key: Tensor
    last_position: Tensor
    first_block: Tensor
    own_block: Tensor
    key_block: Tensor

    @property
    def n_blocks(self) -> int:
        """C."""
        return len(self.first_key)

    def visible(self, rows: Tensor) -> Tensor:
        """bool (b or 1, rows, C): blocks of the query's document up to its own. rows: int64, indices of queries."""
        block = torch.arange(self.n_blocks, device=rows.device)
        return (self.first_block[:, rows, None] <= block) & (block <= self.own_block[:, rows, None])

    def distance_to_blocks(self, rows: Tensor) -> Tensor:
        """int64 (b or 1, rows, C), tokens to the last one that the query sees of each block up to its own."""
        return (self.position[:, rows, None] - self.last_position).clamp(min=0)

    def running_means(self, k: Tensor) -> Tensor:
        """k: (B, G, keys, D) -> (B, G, C, size, D) in float32 (float64 for such k): the mean of a block's keys up to
        each of its tokens, the last of which is the summary of a full block."""
        dtype = torch.promote_types(k.dtype, torch.float32)
        count = torch.arange(1, self.size + 1, device=k.device)
        tokens = (self.first_key[:, None] + count - 1).clamp(max=self.n_keys - 1)
        return k[:, :, tokens].to(dtype).cumsum(3) / count.to(dtype)[:, None]

    def view(self, log_p: Tensor, slopes: Tensor | None) -> View:
        """Tokens of the blocks whose log_p, (B, H, n, C), is not -inf, up to the query; log_p is added to scores."""
        distance, block, chosen = self.distance(self.key_position), self.key_block, log_p.detach()
        positional = alibi(slopes, distance)

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (distance(b, i, j) >= 0) & (chosen[b, h, i, block[j]] != -torch.inf)

        def bias(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            added = log_p[b, h, i, block[j]]
            return added if positional is None else added + positional(b, h, i, j)

        return View(visible, bias, self.own_key - self.position, self.own_key)

    def tokens_read(self, live: Tensor) -> Tensor:
        """int64 (B, H, n): tokens up to the query of live blocks. live: bool (B, H, n, C)."""
        own = live.gather(-1, self.own_block[:, None, :, None].expand(*live.shape[:3], 1)).squeeze(-1)
        return live.sum(-1) * self.size - own * (self.size - 1 - self.position % self.size)[:, None]

    def tiles(self, live: Tensor, tile: int) -> Tensor:
        """bool (B, H, query tiles, key tiles): where a query of the tile reads a key of the tile. live: as above."""
        heads, n_queries = live.shape[:2], live.shape[2]
        rows, columns = -(-n_queries // tile), -(-self.n_keys // tile)
        own = self.own_block[:, None, :, None].expand(*live.shape[:3], 1)
        own_live = live.gather(-1, own).squeeze(-1).int()
        full = live.scatter(-1, own, False)
        full = pad(full, (0, 0, 0, rows * tile - n_queries)).unflatten(2, (rows, tile)).any(3).int()
        found = torch.zeros(*heads, rows * columns, dtype=torch.int32, device=live.device)
        row = torch.arange(n_queries, device=live.device) // tile * columns
        start = self.first_key[self.own_block]
        for further in range(-(-self.size // tile) + 1):  # tiles that a block may reach into
            index = row + torch.minimum(start // tile + further, self.own_key // tile)
            found.scatter_add_(-1, index[:, None].expand_as(own_live), own_live)
            index = torch.minimum(self.first_key // tile + further, self.last_key // tile)
            found.view(*heads, rows, columns).index_add_(-1, index, full)
        return found.view(*heads, rows, columns) > 0


def packed_blocks(
    config: HierarchicalConfig, n_tokens: int, cu_seqlens: Tensor | None, max_seqlen: int, device: torch.device
) -> Blocks:
    """Of a forward pass without a cache. cu_seqlens, max_seqlen: as in `packed_positions`."""
    return _blocks(config, packed_positions(n_tokens, cu_seqlens, max_seqlen, device))


def cached_blocks(config: HierarchicalConfig, extension: Extension) -> Blocks:
    """Of tokens that continue the rows of a cache. What a row has not filled yet lies behind its queries."""
    return _blocks(config, cached_positions(extension))


def _blocks(config: HierarchicalConfig, tokens: TokenPositions) -> Blocks:
    size, starts = config.block, tokens.starts
    ends = (-(-tokens.lengths // size)).cumsum(0)
    first = torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])  # block of each document
    block = torch.arange(tokens.n_keys // size + len(starts), device=starts.device)
    of = torch.searchsorted(ends, block, right=True).clamp(max=len(starts) - 1)
    first_position = torch.minimum((block - first[of]) * size, (tokens.lengths[of] - 1).clamp(min=0))
    first_key = (starts[of] + first_position).clamp(max=tokens.n_keys - 1)
    stop = (starts + tokens.lengths)[of].clamp(min=1)
    return Blocks(
        **vars(tokens), size=size, first_key=first_key, last_key=torch.minimum(first_key + size, stop) - 1,
        last_position=first_position + size - 1,
        first_block=first[tokens.document][None].expand_as(tokens.position),
        own_block=first[tokens.document] + tokens.position // size,
        key_block=first[tokens.key_document] + tokens.key_position // size,
    )  # fmt: skip
