"""Sizes of hierarchical entmax, and what follows from them alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.checks import check_number

LARGEST = 2**20  # tokens: a number beyond is a slip


@dataclass
class HierarchicalConfig:
    """How keys are divided into blocks, and how blocks are chosen.

    Attributes:
        block: tokens of a block, counted from the start of the document.
        adaptive_temperature: queries are scaled as asentmax's (attention.temperature_*), in the scores of blocks and in
            those of tokens.
    """

    block: int = 64
    adaptive_temperature: bool = False

    def __post_init__(self) -> None:
        check_number("attention.hierarchical.block", self.block, least=1, most=LARGEST, whole=True)

    def summaries_read(self, lengths: Sequence[int] | NDArray[np.int64]) -> float:
        """Summaries that all queries of documents of these lengths in tokens rate: of each block up to their own."""
        whole, rest = np.divmod(np.asarray(lengths, np.int64), self.block)
        return float((self.block * whole * (whole + 1) // 2 + rest * (whole + 1)).sum())
