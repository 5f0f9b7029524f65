"""What the passes of a forward return and keep, and how large that is."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.common.key_lists import SPARSE_PERCENT
from kernels.common.launching import ceil_div
from kernels.common.tiles import BLOCK_FIELDS
from kernels.common.visibility import TILE

# The bits of lists of keys grow with the square of the length: past this, where they take half of what else is kept at
# head dim 64, lists of tiles. So with mean documents below the other, which have not been timed
LONGEST_KEY_LIST = 1 << 17
SHORTEST_KEY_LIST = 4096
LONGEST_SHORT_ENTRY = 1 << 16  # keys (queries) that entries of 16 bits tell apart


class Thresholds(NamedTuple):
    """What scan and refinement find. tau: float32 (B, H, Tq), before its last step, which the sum takes. last: float32
    (2, B, H, Tq), slope and step of the refinement's last one. bits: int32 (B, H, query tiles, words), one bit for each
    tile of keys with weight. Empty unless `lists_keys`: key_bits, int32 (B, H, words), one for each key and tile of
    queries (key_lists.key_words); row_bits, int32 (B, H, words), one for each query and tile of keys
    (key_lists.row_words); sparse, uint8 (B, H, query tiles), 1 where passes follow key_bits, 0 where bits. passes: over
    lists, int32 (B, H, query tiles). rows, blocks: of tiles.Intervals. What was not asked for is empty."""

    tau: Tensor
    last: Tensor
    bits: Tensor
    key_bits: Tensor
    row_bits: Tensor
    sparse: Tensor
    passes: Tensor
    rows: Tensor
    blocks: Tensor


class WeightedSum(NamedTuple):
    """out: (B, H, Tq, D), in memory (B, Tq, H, D), as the projection after it takes it: nothing is kept twice. tau:
    float32 (B, H, Tq), final. support: int32 (B, H, Tq). live: tiles, int64 (B, H). What was not asked for is empty."""

    out: Tensor
    tau: Tensor
    support: Tensor
    live: Tensor


class ListBits(NamedTuple):
    """Of Thresholds: where single keys and queries have weight."""

    key_bits: Tensor
    row_bits: Tensor
    sparse: Tensor


def lists_keys(n_queries: int, n_keys: int, n_documents: int) -> bool:
    """Whether lengths let passes after the scan follow single keys where these are few."""
    return max(n_queries, n_keys) <= LONGEST_KEY_LIST and n_keys >= SHORTEST_KEY_LIST * n_documents


def is_triangular(n_queries: int, n_keys: int, causal: bool, kv_lens: Tensor | None) -> bool:
    """Whether query i sees no key after i, so that bits of later ones need no memory."""
    return causal and n_queries == n_keys and kv_lens is None


def kept_triangular(key_bits: Tensor, n_queries: int, n_keys: int) -> bool:
    """What is_triangular said when key_bits were allocated, which are shorter where it was true."""
    return n_queries == n_keys and key_bits.shape[-1] == list_words(n_queries, n_keys, True)[0]


def tile_words(n_keys: int) -> int:
    """int32 words of one bit a tile of keys."""
    return ceil_div(n_keys, 32 * TILE)


def list_words(n_queries: int, n_keys: int, triangular: bool) -> tuple[int, int]:
    """int32 words a head of key bits and of row bits."""
    n_blocks, n_words = ceil_div(n_queries, TILE), tile_words(n_keys)
    if triangular:
        return n_blocks * (n_blocks + 1), n_words * n_queries - 16 * TILE * n_words * (n_words - 1)
    return n_blocks * ceil_div(n_keys, TILE) * (TILE // 32), n_words * n_queries


def kept_bits(n_tokens: int, n_documents: int) -> int:
    """Bits a query head that backward of causal self-attention needs to know where weight is."""
    words = ceil_div(n_tokens, TILE) * tile_words(n_tokens)
    if lists_keys(n_tokens, n_tokens, n_documents):
        words += sum(list_words(n_tokens, n_tokens, True))
    return 32 * words


def listed_entries(n_tiles: int) -> int:
    """Most single entries of a list in place of n_tiles tiles (key_lists.is_sparse), whole steps."""
    return ceil_div(n_tiles * TILE * SPARSE_PERCENT.value, 100 * TILE) * TILE


def entry_dtype(n_tiles: int) -> torch.dtype:
    """Of the entries of a list in place of n_tiles tiles."""
    return torch.uint16 if n_tiles * TILE <= LONGEST_SHORT_ENTRY else torch.int32


def empty_thresholds(
    q: Tensor,
    k: Tensor,
    causal: bool,
    cu_seqlens: Tensor | None,
    kv_lens: Tensor | None,
    gradient: bool,
    stats: bool,
) -> Thresholds:
    """Allocated."""
    batch, heads, n_queries = q.shape[:3]
    n_keys = k.shape[2]
    n_blocks = ceil_div(n_queries, TILE)
    n_documents = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    keys = not stats and lists_keys(n_queries, n_keys, n_documents)  # statistics count tiles
    n_key_words, n_row_words = list_words(n_queries, n_keys, is_triangular(n_queries, n_keys, causal, kv_lens))
    interval_batch = 1 if kv_lens is None else batch
    return Thresholds(
        tau=q.new_empty((batch, heads, n_queries), dtype=torch.float32),
        last=q.new_empty((2, batch, heads, n_queries), dtype=torch.float32),
        bits=q.new_empty((batch, heads, n_blocks, tile_words(n_keys)), dtype=torch.int32),
        key_bits=q.new_zeros((batch, heads, n_key_words) if keys else 0, dtype=torch.int32),
        row_bits=q.new_zeros((batch, heads, n_row_words) if keys and gradient else 0, dtype=torch.int32),
        sparse=q.new_empty((batch, heads, n_blocks) if keys else 0, dtype=torch.uint8),
        passes=q.new_empty((batch, heads, n_blocks) if stats else 0, dtype=torch.int32),
        rows=q.new_empty((2, interval_batch, n_queries), dtype=torch.int32),
        blocks=q.new_empty((interval_batch, n_blocks, BLOCK_FIELDS), dtype=torch.int32),
    )


def empty_sum(q: Tensor, stats: bool) -> WeightedSum:
    """Allocated."""
    batch, heads, n_queries, head_dim = q.shape
    return WeightedSum(
        out=q.new_empty((batch, n_queries, heads, head_dim)).transpose(1, 2),
        tau=q.new_empty((batch, heads, n_queries), dtype=torch.float32),
        support=q.new_empty((batch, heads, n_queries) if stats else 0, dtype=torch.int32),
        live=q.new_zeros((batch, heads) if stats else 0, dtype=torch.int64),
    )
