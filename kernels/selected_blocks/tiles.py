"""Device functions of attention over selected blocks: rows of a list of readers, and their scores with a block."""

import triton
import triton.language as tl

from kernels.common.tiles import add_position_bias

# arguments that vary with the input's length: Triton shall not compile for their values
LENGTHS = ["n_queries", "n_keys", "n_rows", "count", "groups"]


@triton.jit
def listed_rows(p_order, tile, begin, end, n_queries, count, REPEAT: tl.constexpr, BM: tl.constexpr):
    """Tile `tile` of a part of readers: rows are pairs of a query and the part's block, REPEAT query heads of each.

    Returns which rows there are, their pairs, queries, and query heads within the group, each [BM]."""
    row = tile * BM + tl.arange(0, BM)
    index = begin + row // REPEAT
    inside = index < end
    pair = tl.load(p_order + index, mask=inside, other=0)
    return inside, pair, pair // count % n_queries, row % REPEAT


@triton.jit
def gather_rows(p, head, token, stride_h, stride_t, inside, D: tl.constexpr, BD: tl.constexpr):
    """[rows, BD] of a (heads, tokens, D) tensor, 0 where not inside and past D. head, token: [rows]."""
    dim = tl.arange(0, BD)
    rows = head.to(tl.int64) * stride_h + token.to(tl.int64) * stride_t
    mask = inside[:, None]
    if D != BD:
        mask = mask & (dim < D)[None, :]
    return tl.load(p + rows[:, None] + dim[None, :], mask=mask, other=0.0)


@triton.jit
def block_keys(first, chunk, n_keys, SIZE: tl.constexpr, BN: tl.constexpr):
    """Keys of a tile of BN keys of a block, and which of them there are, each [BN]. first: below 0 there are none."""
    offset = chunk * BN + tl.arange(0, BN)
    key = first + offset
    return key, (offset < SIZE) & (key < n_keys) & (first >= 0)


@triton.jit
def seen_scores(
    q, k, key, there, first, own, slope, inside, BIAS: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Raw scores (bias in the same units) of rows with a tile of keys, -inf where a row does not see a key. q: [rows,
    BD], k: [BN, BD]. own, slope, inside: [rows]; key, there: [BN]. first: a key that distances are counted from."""
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if BIAS:
        x = add_position_bias(x, own[:, None], key[None, :], first, slope[:, None])
    return tl.where(inside[:, None] & there[None, :] & (key[None, :] <= own[:, None]), x, float("-inf"))


@triton.jit
def row_slopes(p_slopes, head, inside, scale, BIAS: tl.constexpr):
    """ALiBi slopes in units of q k, 0 without BIAS, [rows]. head: [rows]."""
    if BIAS:
        return tl.load(p_slopes + head, mask=inside, other=0.0) / scale
    else:
        return tl.zeros_like(head).to(tl.float32)
