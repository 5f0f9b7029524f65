"""Where blocks of tokens stand, and their summaries.

Blocks are numbered from the start of a query's document: block c is its tokens c * size ... (c + 1) * size - 1. Only
its own one may end early, so that summaries are those of full blocks, which stand one behind the other for all
documents, in as many places as there can be at most (keys / size): shapes do not depend on where documents end.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.hierarchical.config import HierarchicalConfig
from model.kv_cache import Extension
from model.token_positions import TokenPositions, cached_positions, packed_positions
from model.visible_attention import View, alibi


@dataclass(frozen=True)
class Blocks(TokenPositions):
    """Of one forward pass, alike in all layers.

    size: tokens of a block. n_blocks: C, of the longest document. own_block: int64 (b or 1, n), each query's own.
    key_block: int64 (keys,), each key's. first_key: int64 (P,), index of the first token of each block of each document
    (some token where there is no such block). own_place: int64 (b or 1, n), where each query's own mean stands among
    the P * size of `running_means`. full: int64 (F,), the places among P of full blocks. first_full: int64 (n,), where
    those of each query's document begin among F. seen_keys: int32 (b or 1, n) each, the first and the last key that
    each query may see. block_start: int32 (keys,), the first key of each key's block. block_ends: int32 (F,), the last
    key of each full block, -1 behind the last one.
    """

    size: int
    n_blocks: int
    own_block: Tensor
    key_block: Tensor
    first_key: Tensor
    own_place: Tensor
    full: Tensor
    first_full: Tensor
    seen_keys: tuple[Tensor, Tensor]
    block_start: Tensor
    block_ends: Tensor

    def visible(self, rows: Tensor) -> Tensor:
        """bool (b or 1, rows, C): blocks up to the query's own. rows: int64, indices of queries."""
        return torch.arange(self.n_blocks, device=rows.device) <= self.own_block[:, rows, None]

    def distance_to_blocks(self, rows: Tensor) -> Tensor:
        """int64 (b or 1, rows, C), tokens to the last one that the query sees of each block up to its own."""
        last = (torch.arange(self.n_blocks, device=rows.device) + 1) * self.size - 1
        return (self.position[:, rows, None] - last).clamp(min=0)

    def running_means(self, k: Tensor) -> Tensor:
        """k: (B, G, keys, D) -> (B, G, P, size, D) in float32 (float64 for such k): the mean of a block's keys up to
        each of its tokens, the last of which is the summary of a full block."""
        dtype = torch.promote_types(k.dtype, torch.float32)
        count = torch.arange(1, self.size + 1, device=k.device)
        tokens = (self.first_key[:, None] + count - 1).clamp(max=self.n_keys - 1)
        return k[:, :, tokens].to(dtype).cumsum(3) / count.to(dtype)[:, None]

    def full_within_reach(self, rows: slice) -> Tensor:
        """int64 (W,), places among F with all full blocks that the queries `rows` see, without asking the device. Some
        may lie behind the last one."""
        places = torch.arange(len(self.full), device=self.full.device)
        if self.reach is None:
            return places
        width = min((rows.stop - rows.start + self.reach) // self.size, rows.stop // self.size)
        return self.first_full[rows.start] + places[: max(1, width)]

    def view(self, log_p: Tensor, slopes: Tensor | None) -> View:
        """Tokens of the blocks whose log_p, (B, H, n, C), is not -inf, up to the query; log_p is added to scores."""
        distance, block, chosen = self.distance(self.key_position), self.key_block, log_p.detach()
        positional, causal = alibi(slopes, distance), self.visible_keys()

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return causal(b, h, i, j) & (chosen[b, h, i, block[j]] != -torch.inf)

        def bias(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            added = log_p[b, h, i, block[j]]
            return added if positional is None else added + positional(b, h, i, j)

        return self.view_of(visible, bias)

    def tokens_read(self, live: Tensor) -> Tensor:
        """int64 (B, H, n): tokens up to the query of live blocks. live: bool (B, H, n, C)."""
        own = live.gather(-1, self.own_block[:, None, :, None].expand(*live.shape[:3], 1)).squeeze(-1)
        return live.sum(-1) * self.size - own * (self.size - 1 - self.position % self.size)[:, None]

    def tiles(self, live: Tensor, tile: int) -> Tensor:
        """bool (B, H, query tiles, key tiles): where a query of the tile reads a key of the tile. live: as above."""
        batch, heads, n_queries, _ = live.shape
        rows, columns = -(-n_queries // tile), -(-self.n_keys // tile)
        own_key = self.own_key[..., None]
        start = own_key - self.position[..., None] + torch.arange(self.n_blocks, device=live.device) * self.size
        last = torch.minimum(start + self.size - 1, own_key) // tile
        row = torch.arange(n_queries, device=live.device)[:, None] // tile * columns
        found = torch.zeros(batch, heads, rows * columns, dtype=torch.int32, device=live.device)
        for further in range(-(-self.size // tile) + 1):  # tiles that a block may reach into
            index = (row + torch.minimum(start // tile + further, last)).flatten(1).expand(batch, -1)
            for head in range(heads):
                found[:, head].scatter_add_(-1, index, live[:, head].flatten(1).int())
        return found.view(batch, heads, rows, columns) > 0


def packed_blocks(
    config: HierarchicalConfig, n_tokens: int, cu_seqlens: Tensor | None, max_seqlen: int, device: torch.device
) -> Blocks:
    """Of a forward pass without a cache. cu_seqlens, max_seqlen: as in `packed_positions`."""
    return _blocks(config, packed_positions(n_tokens, cu_seqlens, max_seqlen, device))


def cached_blocks(config: HierarchicalConfig, extension: Extension) -> Blocks:
    """Of tokens that continue the rows of a cache. What a row has not filled yet lies behind its queries."""
    return _blocks(config, cached_positions(extension))


def _blocks(config: HierarchicalConfig, tokens: TokenPositions) -> Blocks:
    size, starts, device = config.block, tokens.starts, tokens.starts.device
    longest = tokens.n_keys if tokens.reach is None else tokens.reach
    full_counts = tokens.lengths // size
    ends, full_ends = (-(-tokens.lengths // size)).cumsum(0), full_counts.cumsum(0)
    first, first_full = (torch.cat([torch.zeros_like(one[:1]), one[:-1]]) for one in (ends, full_ends))  # by document
    place = torch.arange(tokens.n_keys // size + len(starts), device=device)
    of = torch.searchsorted(ends, place, right=True).clamp(max=len(starts) - 1)
    first_position = torch.minimum((place - first[of]) * size, (tokens.lengths[of] - 1).clamp(min=0))
    full = torch.arange(max(1, tokens.n_keys // size), device=device)
    full_of = torch.searchsorted(full_ends, full, right=True).clamp(max=len(starts) - 1)
    own_block = tokens.position // size
    full = (first[full_of] + full - first_full[full_of]).clamp(max=len(place) - 1)
    first_key = (starts[of] + first_position).clamp(max=tokens.n_keys - 1)
    is_full = torch.arange(len(full), device=device) < full_ends[-1]
    key = torch.arange(tokens.n_keys, device=device)
    return Blocks(
        **vars(tokens), size=size, n_blocks=-(-longest // size), own_block=own_block,
        key_block=tokens.key_position // size, first_key=first_key,
        own_place=(first[tokens.document] + own_block) * size + tokens.position % size,
        full=full, first_full=first_full[tokens.document],
        seen_keys=((tokens.own_key - tokens.position).int(), tokens.own_key.int()),
        block_start=(key - tokens.key_position % size).int(),
        block_ends=(first_key[full] + size - 1).where(is_full, -1).int(),
    )  # fmt: skip
