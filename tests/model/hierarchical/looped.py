"""Hierarchical entmax written out for one document: loops over heads, queries, blocks and keys in float64, and dense
products in any dtype, with autograd's gradients."""

from math import exp, log
from typing import Any

import torch
from torch import Tensor

from kernels.alpha_entmax.reference import entmax_reference
from model.config import AttentionConfig, HierarchicalConfig, ModelConfig

BLOCK = 8


def network(
    block: int = BLOCK, positions: str = "nope", adaptive_temperature: bool = False, **options: Any
) -> ModelConfig:
    widths = dict(vocab_size=61, n_layers=1, d_model=24, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=32)
    sizes = HierarchicalConfig(block=block, adaptive_temperature=adaptive_temperature)
    attention = AttentionConfig(kind="hierarchical", hierarchical=sizes)
    return ModelConfig(**{**widths, **options}, positions=positions, attention=attention)  # type: ignore[arg-type]


def draw(n_tokens: int, rows: int = 1, seed: int = 1, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """q (rows, 4, n, 8), k and v (rows, 2, n, 8), float64. scale: of queries: of 3 some blocks are dead, some live."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(rows, heads, n_tokens, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    return scale * q, k, v


def entmax_of(scores: list[float], alpha: float) -> list[float]:
    """By bisection for the threshold."""
    z = [(alpha - 1) * (score - max(scores)) for score in scores]
    low, high = -1.0, 0.0
    for _ in range(200):
        tau = (low + high) / 2
        total = sum(max(one - tau, 0.0) ** (1 / (alpha - 1)) for one in z)
        low, high = (tau, high) if total >= 1 else (low, tau)
    return [max(one - low, 0.0) ** (1 / (alpha - 1)) for one in z]


def block_weights(q: Tensor, k: Tensor, alpha: float, slope: float, block: int) -> list[float]:
    """p of one query, which stands at the last of the keys. q: (D,), k: (t + 1, D)."""
    t, scores = len(k) - 1, []
    for first in range(0, t + 1, block):
        tokens = range(first, min(first + block, t + 1))
        summary = sum(k[j] for j in tokens) / len(tokens)
        scores.append(float(q @ summary) * len(q) ** -0.5 - slope * (t - tokens[-1]))
    return entmax_of(scores, alpha)


def attend(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, slopes: Tensor | None, block: int = BLOCK) -> Tensor:
    """q: (H, T, D), k and v: (G, T, D), alpha: (H,) -> (H, T, D)."""
    out, per_group = torch.zeros_like(q), q.shape[0] // k.shape[0]
    for h in range(q.shape[0]):
        keys, values, slope = k[h // per_group], v[h // per_group], 0.0 if slopes is None else float(slopes[h])
        for t in range(q.shape[1]):
            p = block_weights(q[h, t], keys[: t + 1], float(alpha[h]), slope, block)
            read = [j for j in range(t + 1) if p[j // block] > 0]
            scores = [
                float(q[h, t] @ keys[j]) * q.shape[2] ** -0.5 - slope * (t - j) + log(p[j // block]) for j in read
            ]
            weights = [exp(score - max(scores)) for score in scores]
            out[h, t] = torch.tensor(weights, dtype=q.dtype) @ values[read] / sum(weights)
    return out


def dense(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, slopes: Tensor | None, block: int = BLOCK) -> Tensor:
    """q: (..., H, T, D), k and v: (..., G, T, D), alpha: (H,). A mean key's score is the mean of its keys' scores."""
    n, groups = q.shape[-2], q.shape[-3] // k.shape[-3]
    k, v = (x.repeat_interleave(groups, -3) for x in (k, v))
    token, first = torch.arange(n, device=q.device), torch.arange(0, n, block, device=q.device)
    last = torch.minimum(first + block - 1, token[:, None])  # [T, C]
    inside = (token >= first[:, None]) & (token <= last[..., None])  # [T, C, T]
    scores = q @ k.mT * q.shape[-1] ** -0.5
    rated = (scores[..., None, :] * inside).sum(-1) / inside.sum(-1).clamp(min=1)
    if slopes is not None:
        rated = rated - slopes[:, None, None].to(q) * (token[:, None] - last)
        scores = scores - slopes[:, None, None].to(q) * (token[:, None] - token)
    p = entmax_reference(rated.masked_fill(first > token[:, None], -torch.inf), alpha[:, None, None].to(q))
    causal = token <= token[:, None]
    exponentials = (scores - scores.masked_fill(~causal, -torch.inf).amax(-1, keepdim=True)).exp()
    weights = exponentials * p.repeat_interleave(block, -1)[..., :n] * causal
    return weights / weights.sum(-1, keepdim=True) @ v
