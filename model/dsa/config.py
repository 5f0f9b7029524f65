"""Sizes of DeepSeek Sparse Attention and how its indexer is trained, and what follows from them alone."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from common.checks import check_number
from model.nsa.config import LARGEST, Counts, banded

Stage = Literal["warmup", "sparse"]


@dataclass
class DSAConfig:
    """The lightning indexer, and what it chooses. The released model has 64 heads of 128 and chooses 2,048 tokens, for
    128 query heads and a width of 7,168; its indexer multiplies in FP8 behind a Hadamard rotation, which are left out.

    Attributes:
        index_heads, index_dim: heads of the index queries, and their width, which is also that of the one index key a
            token has. Under rope half of the channels are rotated.
        select_tokens: keys that a query attends to, the same for all heads.
        stage: "warmup" attends to all keys, while the indexer learns to tell what they weigh; "sparse" attends to the
            chosen ones, and the indexer learns from the weights that these have.
        freeze: in "warmup" the indexer alone learns, as in the paper; false: all weights do.
        loss_weight: of the indexer's loss beside that of the language model. None of the two reaches the other's
            weights, so that it counts beside gradient clipping alone.
        equal_parameters: the feed-forward layers are narrower than d_ff by the indexer, so that a model has as many
            parameters as one with softmax. false: where weights of a softmax model are taken over.
    """

    index_heads: int = 4
    index_dim: int = 32
    select_tokens: int = 2048
    stage: Stage = "sparse"
    freeze: bool = True
    loss_weight: float = 1.0
    equal_parameters: bool = False

    def __post_init__(self) -> None:
        name = "attention.dsa."
        check_number(name + "index_heads", self.index_heads, least=1, most=LARGEST, whole=True)
        check_number(name + "index_dim", self.index_dim, least=8, most=LARGEST, whole=True)
        check_number(name + "select_tokens", self.select_tokens, least=1, most=LARGEST, whole=True)
        check_number(name + "loss_weight", self.loss_weight, above=0, most=1e4)
        if self.index_dim % 4:
            raise ValueError(
                f"{name}index_dim is {self.index_dim}: expected a multiple of 4, since rope pairs the channels of half"
            )
        if self.stage not in get_args(Stage):
            raise ValueError(f"{name}stage is {self.stage!r}: expected one of {get_args(Stage)}")

    @property
    def is_sparse(self) -> bool:
        """Whether attention is on the chosen keys, not on all."""
        return self.stage == "sparse"

    @property
    def freezes(self) -> bool:
        """Whether the indexer alone is trained."""
        return self.freeze and not self.is_sparse

    def extra_parameters(self, d_model: int) -> int:
        """Parameters of a layer that a softmax layer has not: the projections to index queries, key and weights of
        heads, and the key's LayerNorm."""
        return self.matrix_parameters(d_model) + 2 * self.index_dim

    def matrix_parameters(self, d_model: int) -> int:
        """Those of the projections."""
        return d_model * (self.index_heads * self.index_dim + self.index_dim + self.index_heads)

    def density(self, lengths: Counts, n_heads: int, head_dim: int) -> float:
        """Keys that queries attend to over those that they may see, and the indexer's products over those of dense
        attention (index_heads * index_dim multiplications for each visible key, beside 2 H D). lengths: of the
        documents, in tokens."""
        n = np.asarray(lengths, np.int64)
        chosen = banded(n, self.select_tokens if self.is_sparse else int(n.max(initial=1)))
        share = float(chosen.sum() / (n * (n + 1) // 2).sum())
        return share + self.index_heads * self.index_dim / (2 * n_heads * head_dim)
