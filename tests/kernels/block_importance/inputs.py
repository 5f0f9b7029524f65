"""Cases of the importance of blocks, its definition in loops, and what plain PyTorch gives."""

from dataclasses import dataclass
from math import exp
from typing import Any

import torch
from torch import Tensor

from tests.kernels.helpers import DEVICE, EPS, draw

SLOPES = (1.0, 0.25, 0.0, 0.02)


@dataclass(frozen=True)
class Shape:
    """documents: lengths in tokens. The queries are the last tokens; with `ragged` those of a batch row have 9 fewer
    tokens before them than those of the row before."""

    documents: tuple[int, ...]
    n_queries: int | None = None
    length: int = 8
    stride: int = 4
    block_size: int = 16
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    batch: int = 1
    ragged: bool = False
    slopes: tuple[float, ...] | None = None
    scale: float | None = None
    select_local: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        slopes = None if self.slopes is None else torch.tensor(self.slopes, device=DEVICE)
        return dict(
            compress_length=self.length, compress_stride=self.stride, block_size=self.block_size,
            n_blocks=-(-max(self.documents) // self.block_size), select_local=self.select_local, scale=self.scale,
            alibi_slopes=slopes,
        )  # fmt: skip

    def places(self) -> tuple[Tensor, Tensor]:
        """first_key and position, int64 (B or 1, n), by loops."""
        keys, firsts, positions = 0, [], []
        for length in self.documents:
            firsts += [keys] * length
            positions += list(range(length))
            keys += len(range(0, length - self.length + 1, self.stride))
        n = len(positions)
        tokens = torch.arange(n - (self.n_queries or n), n).repeat(self.batch if self.ragged else 1, 1)
        tokens -= 9 * torch.arange(len(tokens))[:, None]
        assert int(tokens.min()) >= 0
        return torch.tensor(firsts, device=DEVICE)[tokens], torch.tensor(positions, device=DEVICE)[tokens]

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
        """q, and k with as many keys as NSA has places for."""
        n = sum(self.documents)
        q = draw(self.batch, self.heads, self.n_queries or n, self.head_dim, seed=seed, dtype=dtype)
        k = draw(self.batch, self.kv_heads, max(1, n // self.stride), self.head_dim, seed=seed + 1, dtype=dtype)
        return q, k


def looped(q: Tensor, k: Tensor, first_key: Tensor, position: Tensor, **options: Any) -> Tensor:
    """float64, token by token: each token of a compressed key takes a stride's share of its weight to the token's
    block."""
    length, stride, size = (options[name] for name in ("compress_length", "compress_stride", "block_size"))
    scale = q.shape[3] ** -0.5 if options["scale"] is None else options["scale"]
    slopes, local = options["alibi_slopes"], options["select_local"]
    out = torch.zeros(len(q), k.shape[1], q.shape[2], options["n_blocks"], dtype=torch.float64)
    firsts, positions = (x.expand(len(q), -1).tolist() for x in (first_key, position))
    products = (q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale).tolist()
    for b, h, i in ((b, h, i) for b in range(len(q)) for h in range(q.shape[1]) for i in range(q.shape[2])):
        row, at = out[b, h * k.shape[1] // q.shape[1], i], positions[b][i]
        seen = range(len(range(0, at + 1 - length + 1, stride)))
        slope = 0.0 if slopes is None else float(slopes[h])
        scores = [products[b][h][i][firsts[b][i] + m] - slope * (at - (m * stride + length - 1)) for m in seen]
        powers = [exp(score - max(scores)) for score in scores]
        for m in seen:
            for token in range(m * stride, m * stride + length):
                row[token // size] += powers[m] / sum(powers) / stride
    if local is not None:
        for b in range(len(q)):
            for i, at in enumerate(positions[b]):
                own = at // size
                out[b, :, i, max(0, own - local + 1) : own + 1] = torch.inf
                out[b, :, i, 0] = torch.inf
                out[b, :, i, own + 1 :] = -torch.inf
    return out.to(q.device)


def plain(q: Tensor, k: Tensor, first_key: Tensor, position: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """What PyTorch gives with products in the inputs' dtype, without marks; and what rounding a score does to it where
    each product of rows has the error of a random walk, EPS |q| |k|, and a distance its own, EPS of itself: a weight w
    changes by w times its score's error less the mean one."""
    length, stride, size = (options[name] for name in ("compress_length", "compress_stride", "block_size"))
    scale = q.shape[3] ** -0.5 if options["scale"] is None else options["scale"]
    wide, groups = torch.promote_types(q.dtype, torch.float32), k.shape[1]
    keys = k.repeat_interleave(q.shape[1] // groups, 1)
    scores = (q @ keys.mT).to(wide) * scale
    errors = q.to(wide).norm(dim=-1)[..., None] * keys.to(wide).norm(dim=-1)[:, :, None] * scale
    number = torch.arange(k.shape[2], device=q.device) - first_key[:, None, :, None]  # [b, 1, n, keys]
    distance = position[:, None, :, None] - (number * stride + length - 1)
    if options["alibi_slopes"] is not None:
        bias = options["alibi_slopes"].to(wide)[:, None, None] * distance
        scores, errors = scores - bias, errors + bias.abs()
    seen = (number >= 0) & (distance >= 0)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
    doubt = EPS * weights * (errors + (weights * errors).sum(-1, keepdim=True))
    token = torch.arange(k.shape[2], device=q.device)[:, None] * stride + torch.arange(length, device=q.device)
    blocks = torch.arange(options["n_blocks"], device=q.device)
    shares = (token[..., None] // size == blocks).sum(1).to(wide) / stride  # [keys, C], of one document
    shares = shares[number[:, 0].clamp(min=0)]  # [b, n, keys, C]

    def divided(x: Tensor) -> Tensor:
        x = x.unflatten(1, (groups, -1)).sum(2)
        return torch.einsum("bgik,bikc->bgic", x, shares.expand(len(x), *shares.shape[1:]))

    return divided(weights), divided(doubt)
