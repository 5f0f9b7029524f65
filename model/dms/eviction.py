"""What decides on eviction, and the noise of training's decisions."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from model.config import ModelConfig

# of splitmix64 (Steele, Lea and Flood 2014), as signed numbers of 64 bits
GAMMA, FIRST, SECOND = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class EvictionLogits(nn.Linear):
    """z = scale * W x + offset of each KV head, W = 0 at the start. The paper reads z off one neuron of a query or key,
    which scores then lack; here, as in the released code, W is a map of its own, of the layer's normalised input."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.d_model, config.n_kv_heads, bias=False)
        assert config.attention.dms is not None
        self.scale, self.offset = config.attention.dms.scale, config.attention.dms.offset

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, n, C) -> (B, G, n), float32 (float64 for such x): scale would enlarge bfloat16's rounding."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            z = linear(x.to(dtype), self.weight.to(dtype))
        return z.transpose(1, 2) * self.scale + self.offset


def logistic_noise(number: Tensor, layer: int, heads: int) -> Tensor:
    """The difference of two Gumbel variables, as Gumbel-sigmoid adds it: float64 (b, heads, n), a function of the
    token's number, int64 (b, n), the layer and the head alone. So a block that is computed again, a run that goes on,
    and micro-batches of another size have the same noise."""
    head = torch.arange(heads, device=number.device)[:, None]
    stream = (layer * 2**12 + head + 1) * GAMMA
    bits = _shifted(_mixed(number[:, None] + stream), 12)
    return torch.logit((bits.double() + 0.5) * 2.0**-52)  # strictly between 0 and 1


def _mixed(x: Tensor) -> Tensor:
    """splitmix64's output for a state, int64, whose products wrap."""
    x = (x ^ _shifted(x, 30)) * FIRST
    x = (x ^ _shifted(x, 27)) * SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (x >> by) & (2 ** (64 - by) - 1)
