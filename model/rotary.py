"""Rotary positions (arXiv:2104.09864), and the ways of scaling them to longer contexts."""

import math

import torch
from torch import Tensor

from model.config import ModelConfig, RopeScaling


def rotary_tables(position: Tensor, config: ModelConfig, last: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 (..., T, D / 2), times the attention factor of YaRN. position: (..., T). last: scalar, the
    largest position of the whole input."""
    angle = position.float()[..., None] * rotary_frequencies(config, last)
    factor = 1.0 if config.rope_scaling is None else attention_factor(config.rope_scaling)
    if factor == 1:
        return angle.cos(), angle.sin()
    return angle.cos() * factor, angle.sin() * factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the halves of each head (Llama's pairing). x: (B, H, T, D) -> float32 (B, H, T, D). cos, sin: (T, D / 2)
    or (B or 1, 1, T, D / 2)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def turned(x: Tensor, position: Tensor, wanted: Tensor | int, frequencies: Tensor | None) -> Tensor:
    """What x would be at another position, float32, as x. x: (heads, T, D), rotated for `position`, int64 (T,).
    wanted: int64 (T,), or one for all. frequencies: of `rotary_frequencies`; None: nothing was rotated."""
    if frequencies is None:
        return x.float()
    goal = wanted.float()[:, None] if isinstance(wanted, Tensor) else wanted
    angle = goal * frequencies - position.float()[:, None] * frequencies  # rounded as the model's
    return rotate(x[None], angle.cos(), angle.sin())[0]


def rotary_frequencies(config: ModelConfig, last: Tensor) -> Tensor:
    """Angle per token of each pair, float32 (D / 2,). last: as in `rotary_tables`, which counts for "dynamic"."""
    dim, scaling, device = config.head_size, config.rope_scaling, last.device
    power = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
    if scaling is not None and scaling.kind == "dynamic":
        length = (last + 1).clamp(min=scaling.original_length)
        stretch = scaling.factor * length / scaling.original_length - (scaling.factor - 1)
        return (config.rope_base * stretch ** (dim / (dim - 2))) ** -power
    frequency = config.rope_base**-power
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    kept = _kept_llama3(frequency, scaling) if scaling.kind == "llama3" else _kept_yarn(config, scaling, device)
    return frequency * kept + frequency / scaling.factor * (1 - kept)


def attention_factor(scaling: RopeScaling) -> float:
    """What multiplies queries and keys: YaRN's, sqrt(1 / t) of arXiv:2309.00071 (equation 22); else 1."""
    if scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0


def _kept_llama3(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """Share of the unscaled frequency: 1 where a turn is short against the original length, 0 where it is long."""
    turns = scaling.original_length * frequency / (2 * math.pi)
    return ((turns - scaling.low_turns) / (scaling.fast_turns - scaling.low_turns)).clamp(0, 1)


def _kept_yarn(config: ModelConfig, scaling: RopeScaling, device: torch.device) -> Tensor:
    """As _kept_llama3, but linear in the pair's index (arXiv:2309.00071, "NTK-by-parts")."""
    dim = config.head_size

    def pair(turns: float) -> float:
        """The pair that turns so often within the original length."""
        return dim * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(config.rope_base))

    low, high = pair(scaling.fast_turns), pair(scaling.low_turns)
    if scaling.whole_pairs:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    index = torch.arange(dim // 2, device=device, dtype=torch.float32)
    return 1 - ((index - low) / (high - low)).clamp(0, 1)
