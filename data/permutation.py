"""Orders that are functions of a key and a place: keyed permutations, and the interleaving of streams."""

from __future__ import annotations

import hashlib
import heapq
import math
import struct
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

FEISTEL_ROUNDS = 6


def derive_key(*parts: int) -> int:
    """A 64-bit key from integers; different parts give unrelated keys."""
    packed = struct.pack(f"<{len(parts)}q", *parts)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(positions: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Images of `positions` under a keyed permutation of range(size), any positions in any order.

    A balanced Feistel network on the next even number of bits, walked along its cycle until it falls below `size`
    (Black and Rogaway, 2002, "Ciphers with arbitrary finite domains"): fewer than four steps on average. Own integer
    arithmetic, because numpy does not promise the same Generator.permutation in every version.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    half, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    round_keys = [np.uint64(derive_key(key - 2**63, i)) for i in range(FEISTEL_ROUNDS)]
    values = np.array(positions, np.uint64)
    outside = np.ones(values.shape, bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for round_key in round_keys:
            left, right = right, left ^ (mix(right + round_key) & mask)
        values[outside] = (left << half) | right
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


class Interleaving:
    """Divides the sequences of a run among streams in proportion to their weights, with random access.

    The streams are the leaves of a binary tree (Huffman's, so that heavy streams lie near the root). At a node, the
    first n sequences give its left child round(n * left / total) of them. Every count is exact integer arithmetic. Each
    node adds at most half a sequence of deviation, halved again at least every second level above: at every prefix, a
    stream is within one sequence of its share for up to three streams, and within two for any number. (One merged order
    of virtual times (k + 1/2) / weight can be off by half a sequence for each stream there is.)
    """

    def __init__(self, weights: Sequence[Fraction | float]) -> None:
        fractions = [Fraction(weight) for weight in weights]
        scale = math.lcm(*(fraction.denominator for fraction in fractions))
        # Entries: weight, order of creation, node; a node is a stream or (left, right, weight of left, weight).
        heap: list[tuple[int, int, Any]] = [(int(f * scale), stream, stream) for stream, f in enumerate(fractions)]
        heapq.heapify(heap)
        for order in range(len(heap), 2 * len(heap) - 1):
            (a, _, left), (b, _, right) = heapq.heappop(heap), heapq.heappop(heap)
            heapq.heappush(heap, (a + b, order, (left, right, a, a + b)))
        self._root = heap[0][2]

    def locate(self, index: int) -> tuple[int, int]:
        """(stream, k): sequence `index` of the run is sequence k of the stream."""
        node = self._root
        while isinstance(node, tuple):
            left, right, left_weight, weight = node
            before = (2 * left_weight * index + weight) // (2 * weight)
            after = (2 * left_weight * (index + 1) + weight) // (2 * weight)
            node, index = (left, before) if after > before else (right, index - before)
        return node, index
