"""Small layers: feed-forward, learnable alpha, temperatures."""

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import AttentionConfig, ModelConfig

ALPHA_MARGIN = 1e-4  # share of the way between the bounds that an alpha which is taken over keeps from them


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202): w_down(silu(w_gate x) * w_up x).

    tile_tokens: 0, or tokens computed at a time (TiledMLP of ALST, arXiv 2506.13996): backward computes each tile
    again, so that values of the inner width exist for one tile only.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w_gate = nn.Linear(config.d_model, config.feed_forward_size, bias=False)
        self.w_up = nn.Linear(config.d_model, config.feed_forward_size, bias=False)
        self.w_down = nn.Linear(config.feed_forward_size, config.d_model, bias=False)
        self.tile_tokens = 0

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C) -> (B, T, C)."""
        if not self.tile_tokens or x.shape[1] <= self.tile_tokens:
            return self._transform(x)
        tiles = (
            checkpoint(self._transform, tile, use_reentrant=False, preserve_rng_state=False)
            for tile in x.split(self.tile_tokens, dim=1)
        )
        return torch.cat(list(tiles), dim=1)

    def _transform(self, x: Tensor) -> Tensor:
        return self.w_down(nn.functional.silu(self.w_gate(x)) * self.w_up(x))  # [B, T, C]


class HeadAlpha(nn.Module):
    """alpha of each head, float32 (H,), fixed or learnable, and on its way there while it is annealed.

    Learnable: alpha = lo + (hi - lo) * sigmoid(alpha_raw + c), where c makes alpha_raw = 0 the start value: a
    parameter near 0 keeps its resolution in bfloat16, where alpha itself would move in steps of 0.0078.
    """

    def __init__(self, config: AttentionConfig, n_heads: int):
        super().__init__()
        self.start, self.lo, self.hi, self.n_heads = config.alpha, config.alpha_min, config.alpha_max, n_heads
        self.anneal_from = config.anneal_from
        self.alpha_raw = nn.Parameter(torch.zeros(n_heads)) if config.learn_alpha else None

    def forward(self, device: torch.device, progress: Tensor | None = None) -> Tensor:
        """progress: scalar in [0, 1), the share of the way from anneal_from to alpha that is done; None for all."""
        alpha = self._target(device)
        return alpha if progress is None else self.anneal_from + (alpha - self.anneal_from) * progress

    @torch.no_grad()
    def taken_over(self, other: "HeadAlpha") -> Tensor | None:
        """alpha_raw (H,) that gives the heads the alphas which `other` has learned, moved inside these bounds: where
        the start or the bounds differ, the same alpha_raw means another alpha. None where one of the two is fixed."""
        if self.alpha_raw is None or other.alpha_raw is None:
            return None
        if (self.start, self.lo, self.hi) == (other.start, other.lo, other.hi):
            return other.alpha_raw
        share = (other._target(other.alpha_raw.device) - self.lo) / (self.hi - self.lo)
        return share.clamp(ALPHA_MARGIN, 1 - ALPHA_MARGIN).logit() - self._offset

    @property
    def _offset(self) -> float:
        """c."""
        share = (self.start - self.lo) / (self.hi - self.lo)
        return math.log(share / (1 - share))

    def _target(self, device: torch.device) -> Tensor:
        if self.alpha_raw is None:
            return torch.full((self.n_heads,), float(self.start), device=device)
        return self.lo + (self.hi - self.lo) * torch.sigmoid(self.alpha_raw.float() + self._offset)


class ScalableTemperature(nn.Module):
    """SSMax (arXiv:2501.19399): a learnable scalar per head times log(2 + position)."""

    def __init__(self, n_heads: int):
        super().__init__()
        self.scalar = nn.Parameter(torch.empty(n_heads))

    def forward(self, x: Tensor, log_position: Tensor) -> Tensor:
        """As AdaptiveTemperature's."""
        return (self.scalar.float()[:, None] * log_position.unsqueeze(-2)).expand(x.shape[0], -1, -1)  # [B, H, T]


class AdaptiveTemperature(nn.Module):
    """ASEntmax (arXiv:2506.16640): offset + softplus(beta(x)) * log(2 + position) ** (range * tanh(gamma(x))), per
    token and head. beta's bias starts at temperature_bias."""

    def __init__(self, config: ModelConfig, n_heads: int):
        super().__init__()
        self.offset, self.range = config.attention.temperature_offset, config.attention.temperature_range
        self.beta = nn.Linear(config.d_model, n_heads)
        self.gamma = nn.Linear(config.d_model, n_heads)

    def forward(self, x: Tensor, log_position: Tensor) -> Tensor:
        """x: (B, T, C), log_position: float32 (T,) or (B or 1, T) = log(2 + position). Returns float32 (B, H, T)."""
        strength = nn.functional.softplus(self.beta(x).float())
        exponent = self.range * torch.tanh(self.gamma(x).float())
        return (self.offset + strength * log_position[..., None] ** exponent).transpose(1, 2)
