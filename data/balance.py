"""Which rank computes which sequences of an optimizer step, so that ranks wait little for each other.

Attention's work grows with the square of a document's length, so packed sequences of equal length cost different times:
one document of 131,072 tokens several times as much as 128 of 1,024. A step's gradient needs all its sequences,
whichever rank computes them.
"""

import heapq
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Cost = Callable[[NDArray[np.int64]], float]  # of a sequence, by the lengths of its documents


def share_out(costs: NDArray[np.float64], ranks: int, micro_batch_size: int) -> NDArray[np.int64]:
    """(ranks, micro-batches, micro_batch_size) int64: each of the step's sequences once, by its place in `costs`.

    The longest processing time first (Graham 1969), to the rank with the least work among those that lack sequences:
    every rank gets as many. A rank takes its expensive ones first, so that micro-batch a costs about the same on all
    ranks, which ZeRO stage 3 waits for. Sequences of equal cost stay where they are without any of this: micro-batch a
    of rank r is the (a ranks + r)-th.

    costs: (sequences,), a multiple of ranks x micro_batch_size.
    """
    if costs.min() == costs.max():
        return np.arange(len(costs)).reshape(-1, ranks, micro_batch_size).swapaxes(0, 1)
    room = len(costs) // ranks
    taken: list[list[int]] = [[] for _ in range(ranks)]
    waiting = [(0.0, rank) for rank in range(ranks)]
    for sequence in np.argsort(-costs, kind="stable").tolist():
        work, rank = heapq.heappop(waiting)
        taken[rank].append(sequence)
        if len(taken[rank]) < room:
            heapq.heappush(waiting, (work + float(costs[sequence]), rank))
    return np.array(taken, np.int64).reshape(ranks, -1, micro_batch_size)


def idle_share(costs: NDArray[np.float64], shares: NDArray[np.int64], each_micro_batch: bool = False) -> float:
    """Share of the ranks' time that they wait for the slowest of a step (each_micro_batch: of each micro-batch, as ZeRO
    stage 3 does), if costs are times. shares: of `share_out`."""
    work = costs[shares].sum(-1)  # (ranks, micro-batches)
    if not each_micro_batch:
        work = work.sum(-1, keepdims=True)
    return 1 - float(work.mean(0).sum() / work.max(0).sum())
