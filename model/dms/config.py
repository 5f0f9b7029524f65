"""Sizes of Dynamic Memory Sparsification, how far it compresses and how fast, and what follows from them alone."""

from dataclasses import dataclass

from common.checks import check_number
from model.nsa.config import LARGEST

LEAST_SHARE = 1e-4  # of tokens that stay: a compression beyond is a slip


@dataclass
class DMSConfig:
    """What decides on eviction, when it happens, and what it is trained for. The defaults are the paper's, for
    Llama-like models of 1B to 8B parameters.

    Attributes:
        window: tokens at a distance of at most this are never evicted: the decision on a token takes effect behind it.
        compression: of the cache, that training aims at: tokens over those that are not evicted. Tokens inside the
            window are there in either case, so that short texts are compressed less.
        ramp_steps: optimizer steps in which the aim rises from 1 to compression, linearly; 0: at once.
        scale, offset: of the logits of eviction, scale * W x + offset with W = 0 at the start: a negative offset evicts
            nothing then, but for noise, a large scale lets a small W decide.
        loss_weight: of the loss that asks for eviction, beside that of the language model.
    """

    window: int = 256
    compression: float = 8.0
    ramp_steps: int = 700
    scale: float = 100.0
    offset: float = -5.0
    loss_weight: float = 1.0

    def __post_init__(self) -> None:
        name = "attention.dms."
        check_number(name + "window", self.window, least=0, most=LARGEST, whole=True)
        check_number(name + "compression", self.compression, above=1, most=1 / LEAST_SHARE)
        check_number(name + "ramp_steps", self.ramp_steps, least=0, whole=True, zero="at once")
        check_number(name + "scale", self.scale, above=0, most=1e4)
        check_number(name + "offset", self.offset, least=-1e4, most=1e4)
        check_number(name + "loss_weight", self.loss_weight, above=0, most=1e4)

    def target(self, step: int) -> float:
        """Share of tokens that the loss wants evicted after `step` optimizer steps: a* = 1 - 1 / CR."""
        done = min(1.0, step / self.ramp_steps) if self.ramp_steps else 1.0
        return 1 - 1 / (1 + (self.compression - 1) * done)

    def extra_parameters(self, d_model: int, n_kv_heads: int) -> int:
        """Parameters of a layer that a softmax layer has not: a row of W for each KV head."""
        return d_model * n_kv_heads
