"""Sizes of Native Sparse Attention (arXiv:2502.11089), and what follows from them alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.checks import check_number

BRANCHES = 3  # compression, selection, window
LARGEST = 2**20  # tokens or blocks: a number beyond is a slip
Counts = Sequence[int] | NDArray[np.int64]


@dataclass
class NSAConfig:
    """How many keys each branch reads. All positions count from the start of the document.

    Attributes:
        compress_length, compress_stride: a compressed key stands for this many tokens, one every so many.
        compress_hidden: width of the hidden layer of phi, the MLP that compresses; None: the head dim.
        select_block: tokens of a block that is selected whole.
        select_count: blocks that a query selects, the first and the local ones included.
        select_local: blocks that it always selects: its own and those just before.
        window: the last tokens that a query sees, itself included.
        equal_parameters: the feed-forward layers are narrower than d_ff by what a layer has beside a softmax layer
            (two more projections of keys and of values, phi, the gates), so that both have as many parameters.
    """

    compress_length: int = 32
    compress_stride: int = 16
    compress_hidden: int | None = None
    select_block: int = 64
    select_count: int = 16
    select_local: int = 2
    window: int = 512
    equal_parameters: bool = False

    def __post_init__(self) -> None:
        name = "attention.nsa."
        for field in ("compress_length", "compress_stride", "select_block", "select_local", "select_count", "window"):
            check_number(name + field, getattr(self, field), least=1, most=LARGEST, whole=True)
        check_number(
            name + "compress_hidden", self.compress_hidden, least=1, most=LARGEST, whole=True, null="the head dim"
        )
        for field in ("compress_length", "select_block"):  # as in the paper, below equation 9
            size = getattr(self, field)
            if size % self.compress_stride:
                raise ValueError(
                    f"{name}{field} is {size}: expected a multiple of compress_stride = {self.compress_stride}"
                )
        if self.select_count <= self.select_local:
            raise ValueError(
                f"{name}select_count is {self.select_count}: expected more than select_local = {self.select_local}, "
                "since the first block and the local ones are always selected"
            )

    def extra_parameters(self, d_model: int, n_heads: int, n_kv_heads: int, head_dim: int, bias: bool) -> int:
        """Parameters of a layer that a softmax layer has not."""
        projections = 2 * (BRANCHES - 1) * n_kv_heads * head_dim * (d_model + bias)
        gates = BRANCHES * n_heads * (d_model + 1)
        hidden = head_dim if self.compress_hidden is None else self.compress_hidden
        phi = self.compress_length * head_dim * (1 + hidden) + hidden * head_dim
        return projections + gates + 2 * phi

    def keys_read(self, lengths: Counts) -> NDArray[np.float64]:
        """Keys that all queries of a document read in the three branches together, a compressed key for one, by the
        documents' lengths in tokens."""
        n = np.asarray(lengths, np.int64)
        compressed = _steps(np.maximum(n - self.compress_length + 1, 0), self.compress_stride)
        return (compressed + self._selected(n) + banded(n, self.window)).astype(np.float64)

    def density(self, lengths: Counts) -> float:
        """keys_read over the number of pairs of a query and a key that it may see: above 1 for short documents, where
        the branches read the same keys twice."""
        n = np.asarray(lengths, np.float64)
        return float(self.keys_read(lengths).sum() / (n * (n + 1) / 2).sum())

    def _selected(self, n: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of the selection branch: all tokens up to the query in the first blocks, then whole blocks but for its own,
        which ends at it."""
        full = self.select_count * self.select_block
        block = self.select_block
        blocks, rest = np.divmod(np.maximum(n - full, 0), block)
        own = blocks * (block * (block + 1) // 2) + rest * (rest + 1) // 2
        return banded(np.minimum(n, full), full) + (full - block) * np.maximum(n - full, 0) + own


def banded(n: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Sum over t < n of min(t + 1, width)."""
    short = np.minimum(n, width)
    return short * (short + 1) // 2 + (n - short) * width


def _steps(n: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Sum over t < n of t // width + 1."""
    whole, rest = np.divmod(n, width)
    return width * whole * (whole + 1) // 2 + rest * (whole + 1)
