"""Lists of single keys (and, in the pass over keys, of single queries) in place of tiles.

A trained model spreads its weights: most tiles hold a pair with weight, while few of their keys have weight for any of
the tile's 64 queries. So passes after the scan go over those keys alone, 64 of a list at a time, wherever they stand.
Lists are two-ended, as those of tiles: inner entries from the front, edges from the back; entry i of one counts edges
after inner ones.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from kernels.common.tiles import INTRINSICS, add_position_bias, bit_or, is_visible, nan_maximum

LIST_WORDS = tl.constexpr(512)  # words of 32 entries examined at once when a list is built
MARKED_TILES = tl.constexpr(128)  # tiles whose marks become key bits at once
FIRST_TILES = tl.constexpr(32)  # tiles of a list after which marking stops if most of their keys are marked
SPARSE_PERCENT = tl.constexpr(70)  # of the tiles' entries, below which passes follow single ones
MARK_WORDS = tl.constexpr(16)  # int32 of marks for two tiles: four lanes of each of four warps hold 16 bits of each


@triton.jit
def entry_slot(i, n_inner, capacity):
    """Where entry i of a two-ended list stands."""
    return tl.where(i < n_inner, i, capacity - 1 - (i - n_inner))


@triton.jit
def key_words(p_key_bits, i_bh, i_block, stride_head, n_key_words, triangular):
    """Where the key bits of a query tile stand: words of as many key tiles as it can see if triangular, n_key_words
    each if not."""
    before = tl.where(triangular != 0, i_block * (i_block + 1), i_block * n_key_words)
    return p_key_bits + i_bh.to(tl.int64) * stride_head + before


@triton.jit
def row_words(p_row_bits, i_word, n_queries, triangular):
    """Where the bits of a head's queries for key tiles [32 i_word, 32 (i_word + 1)) stand, from query 0, though the
    words of those that see none of these tiles (queries below 2048 i_word) are left out if triangular."""
    i_word = tl.cast(i_word, tl.int64)
    return p_row_bits + i_word * n_queries - tl.where(triangular != 0, 1024 * i_word * (i_word + 1), 0)


@triton.jit
def step_entries(p_list, n, n_inner, count, capacity, SIZE: tl.constexpr, MASKED: tl.constexpr):
    """Entries [n SIZE, (n + 1) SIZE) of a list, -1 past its count (if MASKED, else all are inner ones)."""
    i = n * SIZE + tl.arange(0, SIZE)
    if MASKED:
        entry = tl.load(p_list + entry_slot(i, n_inner, capacity), mask=i < count, other=0).to(tl.int32)
        return tl.where(i < count, entry, -1)
    else:
        return tl.load(p_list + i).to(tl.int32)


@triton.jit
def gather_rows(p, index, stride, D: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr):
    """[rows, BD] of a (tokens, D) matrix, at the given rows; 0 for index -1 (if MASKED) and past D."""
    dim = tl.arange(0, BD)
    if MASKED:
        pointers = p + tl.maximum(index, 0).to(tl.int64)[:, None] * stride + dim[None, :]
        return tl.load(pointers, mask=(index >= 0)[:, None] & (dim < D)[None, :], other=0.0)
    else:
        pointers = p + index.to(tl.int64)[:, None] * stride + dim[None, :]
        if D != BD:
            return tl.load(pointers, mask=(dim < D)[None, :], other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def mark_keys(p_marks, marks, excess, n, last):
    """Marks the columns of step n where excess ([64, 64]) is above 0 or NaN in any row. Warps write apart: a dot hands
    a thread columns 2 i and 2 i + 1 of every eight, of rows r and r + 8, and eight threads share its columns.

    marks: int32 [warps, 8, 4], of the present pair of steps, kept in registers until the second (or the last) of it, as
    a store synchronises warps.
    """
    ROWS: tl.constexpr = excess.shape[0]
    excess = tl.reduce(tl.reshape(excess, (ROWS // 16, 2, 8, 8, 4, 2)), 1, nan_maximum)  # [warps, 8, 8, 4, 2]
    bit = 1 << (2 * tl.arange(0, 8)[None, None, :, None, None] + tl.arange(0, 2)[None, None, None, None, :])
    word = tl.where(excess <= 0, 0, bit)
    marks |= tl.reduce(tl.reduce(word, 4, bit_or), 2, bit_or) << (16 * (n % 2))
    if last | (n % 2 == 1):
        place = tl.arange(0, ROWS // 16)[:, None] * 4 + tl.arange(0, 4)[None, :]
        tl.store(p_marks + n // 2 * MARK_WORDS + place, tl.reduce(marks, 1, bit_or))
        marks = tl.zeros_like(marks)
    return marks


@triton.jit
def spread(pairs):
    """Moves the four pairs of bits of a byte to the four bytes of a word."""
    return (pairs & 3) | ((pairs & 12) << 6) | ((pairs & 48) << 12) | ((pairs & 192) << 18)


@triton.jit
def bit_count(word):
    """Bits set in int32."""
    if INTRINSICS:
        return libdevice.popc(word)
    else:
        x = word - ((word >> 1) & 0x55555555)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F
        return (x + (x >> 8) + (x >> 16) + (x >> 24)) & 63


@triton.jit
def write_key_bits(p_marks, p_tiles, tile_step, first, n_tiles, p_words):
    """Writes the marks of listed tiles [first, n_tiles) as two words of key bits a tile. Returns how many keys are
    marked."""
    lane = tl.arange(0, 4)[None, :]
    count = 0
    for start in range(first, n_tiles, MARKED_TILES):
        n = start + tl.arange(0, MARKED_TILES)
        inside = n < n_tiles
        tile = tl.load(p_tiles + n * tile_step, mask=inside, other=0)
        p = p_marks + (n // 2)[:, None] * MARK_WORDS + lane
        mask = inside[:, None]
        marks = tl.load(p, mask=mask, other=0) | tl.load(p + 4, mask=mask, other=0)
        marks = marks | tl.load(p + 8, mask=mask, other=0) | tl.load(p + 12, mask=mask, other=0)
        marks = marks >> (16 * (n % 2))[:, None]  # bit 2 i + j of lane l is column 8 i + 2 l + j
        low = tl.reduce(spread(marks & 255) << 2 * lane, 1, bit_or)
        high = tl.reduce(spread((marks >> 8) & 255) << 2 * lane, 1, bit_or)
        tl.store(p_words + 2 * tile, low, mask=inside)
        tl.store(p_words + 2 * tile + 1, high, mask=inside)
        count += tl.sum(bit_count(low) + bit_count(high), 0)
    return count


@triton.jit
def append_bits(p_list, word, entry, inner, n_inner, n_edge, capacity):
    """Appends entry + i to a list for every bit i of `word`: to its front where `inner`, else to its back. It
    must have room.

    word, entry, inner: [words], at most 1023. The work is that of the words and of the most bits in one, not of all
    entries that might be listed.
    """
    count = bit_count(word)
    share = tl.where(inner, count, count << 16)  # 32 * 1023 entries need 15 bits
    before = tl.cumsum(share, 0) - share
    slot = tl.where(inner, n_inner + (before & 0xFFFF), capacity - 1 - n_edge - (before >> 16))
    for _ in range(0, tl.max(count, 0)):
        lowest = word & -word
        tl.store(p_list + slot, entry + bit_count(lowest - 1), mask=word != 0)
        word ^= lowest
        slot += tl.where(inner, 1, -1)
    total = tl.sum(share, 0)
    return n_inner + (total & 0xFFFF), n_edge + (total >> 16)


@triton.jit
def list_row_keys(p_words, p_list, lo, hi, inner_lo, inner_hi, capacity):
    """Lists the keys of [lo, hi) that have their bit in the words of one query tile. Returns how many are inner, how
    many edges. Bounds are multiples of 32, but for hi."""
    tl.debug_barrier()  # all warps have written their bits
    n_inner, n_edge = 0, 0
    for start in range(lo, hi, 32 * LIST_WORDS):
        key = start + 32 * tl.arange(0, LIST_WORDS)
        word = tl.load(p_words + key // 32, mask=key < hi, other=0)
        word = tl.where(key + 32 > hi, word & ((1 << tl.maximum(hi - key, 0)) - 1), word)
        inner = (key >= inner_lo) & (key < inner_hi)
        n_inner, n_edge = append_bits(p_list, word, key, inner, n_inner, n_edge, capacity)
    tl.debug_barrier()  # the whole program reads the list next
    return n_inner, n_edge


@triton.jit
def is_sparse(count, n_tiles):
    """Whether `count` single entries are under 70 % of the tiles'. With all keys live, on an H100 at head dim 64,
    passes that gather took 1.15 to 1.4 times as long as those over tiles."""
    return count * 100 < n_tiles * (SPARSE_PERCENT * 64)


@triton.jit
def mark_rows(p_row_bits, rows, live, row, inside, tile, next_tile, last, n_queries, triangular):
    """Sets a bit for every (query, tile of keys) that is live, in words of 32 tiles: [words, queries].

    rows: int32 [rows, 4], bits of the present word for each of four lanes, kept in registers until the next tile stands
    in another one. live: [rows, 4]. A list's tiles follow one another, so that one word is written about once.
    """
    rows |= live.to(tl.int32) << (tile % 32)
    if last | (next_tile // 32 != tile // 32):
        p = row_words(p_row_bits, tile // 32, n_queries, triangular) + row
        tl.store(p, tl.load(p, mask=inside, other=0) | tl.reduce(rows, 1, bit_or), mask=inside)
        rows = tl.zeros_like(rows)
    return rows


@triton.jit
def fill_rows(p_row_bits, p_words, tile_lo, tile_hi, row, inside, n_queries, triangular):
    """Row bits of whole tiles: those of the query tile's for each of its rows."""
    for i_word in range(tile_lo // 32, tl.cdiv(tile_hi, 32)):
        word = tl.load(p_words + i_word)
        p = row_words(p_row_bits, i_word, n_queries, triangular) + row
        tl.store(p, tl.zeros_like(row) + word, mask=inside)


@triton.jit
def key_scores(
    q, p_k, stride_k, key, slope, first, end, position, anchor,
    D: tl.constexpr, BD: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """tiles.tile_scores for any keys (-1: none), and the keys themselves. anchor: a position near the queries'."""
    k = gather_rows(p_k, key, stride_k, D, BD, MASKED)
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if BIAS:
        x = add_position_bias(x, position[:, None], key[None, :], anchor, slope)
    if MASKED:
        x = tl.where(is_visible(key[None, :], first[:, None], end[:, None]), x, float("-inf"))
    return x, k
