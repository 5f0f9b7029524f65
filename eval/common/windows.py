"""Windows of a prepared split, at random."""

import numpy as np

from data.store import TokenStore


def choose_windows(store: TokenStore, length: int, most: int, seed: int) -> list[tuple[int, int]]:
    """(document, first token) of up to `most` windows that lie within documents and do not overlap, at random."""
    starts = [
        (document, start)
        for document, size in enumerate(np.asarray(store.lengths).tolist())
        for start in range(0, size - length + 1, length)
    ]
    order = np.random.default_rng([seed, 2]).permutation(len(starts))[:most]
    return [starts[i] for i in order.tolist()]
