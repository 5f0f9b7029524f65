"""Dynamic Memory Sparsification written out: loops over tokens, heads and keys of one document, in float64; and the
cache that it stands for, which forgets token by token."""

from math import exp, log1p

import torch
from torch import Tensor

from model.config import AttentionConfig, DMSConfig, ModelConfig
from model.dms.attention import DynamicMemorySparsification
from model.transformer import Transformer

# logits of about 5, of both signs
SIZES = DMSConfig(window=6, scale=2.0, offset=-0.5)
M64 = 2**64 - 1


def network(sizes: DMSConfig = SIZES, positions: str = "nope", **options) -> ModelConfig:
    widths = dict(vocab_size=61, n_layers=1, d_model=24, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=32)
    return ModelConfig(**{**widths, **options}, positions=positions, attention=AttentionConfig(kind="dms", dms=sizes))  # type: ignore[arg-type]


def module(config: ModelConfig, seed: int = 0, layer: int = 0) -> DynamicMemorySparsification:
    """A layer's, in float64 and in eval mode, that evicts some tokens."""
    torch.manual_seed(seed)
    found = Transformer(config).double().eval().layers()[layer].attention.sparse
    assert isinstance(found, DynamicMemorySparsification)
    torch.nn.init.normal_(found.eviction.weight, std=0.5)
    return found


def splitmix64(state: int) -> int:
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & M64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & M64
    return state ^ (state >> 31)


def noise(number: int, layer: int, head: int) -> float:
    state = (number + (layer * 4096 + head + 1) * 0x9E3779B97F4A7C15) & M64
    u = ((splitmix64(state) >> 12) + 0.5) / 2**52
    return float(torch.tensor(u, dtype=torch.float64).log() - torch.tensor(1 - u, dtype=torch.float64).log())


@torch.no_grad()
def logits(sparse: DynamicMemorySparsification, x: Tensor) -> list[list[float]]:
    """z of each KV head and token. x: (T, C)."""
    eviction = sparse.eviction
    return [[eviction.scale * float(row @ one) + eviction.offset for one in x] for row in eviction.weight]


def evicted(sparse: DynamicMemorySparsification, x: Tensor) -> list[list[bool]]:
    """Of each KV head and token: the logit of the token behind it decides, the last one stays."""
    return [[z > 0 for z in row[1:]] + [False] for row in logits(sparse, x)]


def softened(
    sparse: DynamicMemorySparsification, x: Tensor, numbers: list[int]
) -> tuple[list[list[float]], list[list[int]]]:
    """log(1 - a) and what is evicted, of each KV head and token."""
    log_kept, hard = [], []
    for head, row in enumerate(logits(sparse, x)):
        y = [(z + noise(number, sparse.layer, head)) / 0.1 for z, number in zip(row, numbers, strict=True)][1:]
        # -log(1 + exp(y))
        log_kept.append([-(max(one, 0.0) + log1p(exp(-abs(one)))) for one in y] + [0.0])
        hard.append([int(one > 0) for one in y] + [0])
    return log_kept, hard


def attended(q: Tensor, k: Tensor, v: Tensor, added: list[list[float]], window: int, slopes: Tensor | None) -> Tensor:
    """(H, T, D), with `added` of each KV head and key on the scores of keys at a distance above the window; -inf hides
    them. q: (H, T, D), k, v: (G, T, D)."""
    out, per_group = torch.zeros_like(q), len(q) // len(k)
    for h in range(len(q)):
        g, slope = h // per_group, 0.0 if slopes is None else float(slopes[h])
        for t in range(q.shape[1]):
            scores = [
                float(q[h, t] @ k[g, j]) * q.shape[2] ** -0.5 - slope * (t - j) + (added[g][j] if t - j > window else 0)
                for j in range(t + 1)
            ]
            weights = [exp(score - max(scores)) for score in scores]
            out[h, t] = torch.tensor(weights, dtype=q.dtype) @ v[g, : t + 1] / sum(weights)
    return out


def cached(
    q: Tensor, k: Tensor, v: Tensor, z: list[list[float]], window: int, slopes: Tensor | None
) -> tuple[Tensor, list[list[int]]]:
    """As `attended` where z > 0 evicts, by a cache for each KV head: a list of tokens, which each new token joins; it
    decides on the one before, and whoever then leaves the window is dropped if that has been decided. Also which tokens
    are left."""
    out, left, per_group = torch.zeros_like(q), [], len(q) // len(k)
    for g in range(len(k)):
        held: list[int] = []
        doomed: set[int] = set()
        for t in range(q.shape[1]):
            held.append(t)
            if t and z[g][t] > 0:
                doomed.add(t - 1)
            held = [j for j in held if t - j <= window or j not in doomed]
            for h in range(g * per_group, (g + 1) * per_group):
                slope = 0.0 if slopes is None else float(slopes[h])
                scores = [float(q[h, t] @ k[g, j]) * q.shape[2] ** -0.5 - slope * (t - j) for j in held]
                weights = [exp(score - max(scores)) for score in scores]
                out[h, t] = torch.tensor(weights, dtype=q.dtype) @ v[g, held] / sum(weights)
        left.append(held)
    return out, left
