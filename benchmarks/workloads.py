"""Attention inputs with a known pattern of live tiles, for the kernel benchmark."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHIFT = 23  # tokens by which "shifted" moves the topics off the tiles' grid


def topics(
    n_tokens: int, heads: int, head_dim: int, n_topics: int, *, shift: int = 0, block: int = 64, seed: int = 0,
    device: str | torch.device = "cuda", dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, v (1, heads, n_tokens, head_dim). Keys in blocks of `block` share one of n_topics topics, each block of
    queries wants one: about 1 / n_topics of the tiles hold support. `shift` moves keys off the grid."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def labels() -> Tensor:
        n_blocks = n_tokens // block + 2
        label = torch.randint(n_topics, (heads, n_blocks), generator=generator, device=device)
        return label.repeat_interleave(block, 1)

    topic = torch.nn.functional.normalize(normal(heads, n_topics, head_dim), dim=-1)
    head = torch.arange(heads, device=device)[:, None]
    # strong in the keys, weak in the queries: rows of one topic still differ in which of its keys they weigh
    q = normal(heads, n_tokens, head_dim) + 0.5 * head_dim**0.5 * topic[head, labels()[:, :n_tokens]]
    k = normal(heads, n_tokens, head_dim) + 3 * head_dim**0.5 * topic[head, labels()[:, shift : shift + n_tokens]]
    q = q * 1.4  # spread of the scores: some ten keys of a row get weight at alpha 1.5
    v = normal(heads, n_tokens, head_dim)
    return q.to(dtype)[None], k.to(dtype)[None], v.to(dtype)[None]


def gaussian(
    n_tokens: int, heads: int, head_dim: int, *, spread: float = 2.0, seed: int = 0,
    device: str | torch.device = "cuda", dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, v (1, heads, n_tokens, head_dim) without structure: scores are normal with deviation `spread`, so that
    support is scattered over nearly all tiles."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (1, heads, n_tokens, head_dim)
    q, k, v = (torch.randn(shape, generator=generator, device=device) for _ in range(3))
    return (spread * q).to(dtype), k.to(dtype), v.to(dtype)


def sink_and_window(
    n_tokens: int, heads: int, head_dim: int, *, reach: int = 128, sinks: int = 4, n_topics: int = 64,
    strength: float = 12.0, block: int = 64, seed: int = 0,
    device: str | torch.device = "cuda", dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, v (1, heads, n_tokens, head_dim) whose support lies in the first `sinks` tokens, in a local window (scores
    fall to exp(-1/2) of their peak over `reach` tokens) and in far blocks, about one in n_topics. head_dim >= 32.

    One component says "sink", half of them hold positions as cosines and sines of `reach`-scaled frequencies, the rest
    topics of key blocks; a query scores 0.6 `strength` with each of the three.
    """
    if head_dim < 32:
        raise ValueError(f"head_dim must be at least 32 to hold sinks, positions and topics, got {head_dim}")
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def labels() -> Tensor:
        label = torch.randint(n_topics, (heads, n_tokens // block + 1), generator=generator, device=device)
        return label.repeat_interleave(block, 1)[:, :n_tokens]

    n_frequencies = head_dim // 4
    quantiles = (torch.arange(n_frequencies, device=device) + 0.5) / n_frequencies
    angle = torch.arange(n_tokens, device=device)[:, None] * (math.sqrt(2) * torch.erfinv(quantiles) / reach)
    where = torch.cat([angle.cos(), angle.sin()], -1) / n_frequencies**0.5  # [T, D / 2], unit vectors
    topic = torch.nn.functional.normalize(normal(heads, n_topics, head_dim - 2 * n_frequencies - 1), dim=-1)
    head = torch.arange(heads, device=device)[:, None]
    is_sink = (torch.arange(n_tokens, device=device) < sinks).float()[:, None].expand(heads, -1, 1)
    where = where.expand(heads, -1, -1)
    gain = (strength * head_dim**0.5) ** 0.5
    q = gain * torch.cat([torch.ones_like(is_sink), where, topic[head, labels()]], -1)
    k = gain * torch.cat([is_sink, where, topic[head, labels()]], -1)
    q, k, v = q + normal(*q.shape), k + normal(*k.shape), normal(*k.shape)
    q = q * 0.6  # spread of the scores: some seven keys of a row get weight at alpha 1.5
    return q.to(dtype)[None], k.to(dtype)[None], v.to(dtype)[None]


def document_lengths(n_tokens: int, shortest: int = 1024, longest: int = 16384, *, seed: int = 0) -> list[int]:
    """Lengths of documents, log-uniform in shortest ... longest, that sum to n_tokens. longest >= 2 shortest and
    n_tokens >= shortest."""
    generator = random.Random(seed)
    lengths: list[int] = []
    while left := n_tokens - sum(lengths):
        length = min(left, round(shortest * (longest / shortest) ** generator.random()))
        if 0 < left - length < shortest:  # the rest would be too short for a document
            length = left if left <= longest else left - shortest
        lengths.append(length)
    return lengths


def linear_slopes(heads: int, device: str | torch.device = "cuda") -> Tensor:
    """float32 (heads,): 1, 1/2, 1/3, ..."""
    return 1 / torch.arange(1, heads + 1, device=device, dtype=torch.float32)


@dataclass(frozen=True)
class Workload:
    """One row of a table. q: (1, H, T, D), k and v: (1, G, T, D). alpha, cu_seqlens, alibi_slopes as in
    kernels.entmax_attention; attention is causal, the scale is D ** -0.5. target: the bar, in words."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    alpha: float | Tensor = 1.5
    cu_seqlens: Tensor | None = None
    alibi_slopes: Tensor | None = None
    target: str = ""

    def __post_init__(self) -> None:
        for x in (self.q, self.k, self.v):
            x.requires_grad_()

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of kernels.entmax_attention."""
        return dict(alpha=self.alpha, cu_seqlens=self.cu_seqlens, alibi_slopes=self.alibi_slopes)

    def inputs(self, with_alpha: bool) -> tuple[Tensor, ...]:
        """What gradients are taken of: q, k, v, and alpha where it is learned and asked for."""
        if with_alpha and isinstance(self.alpha, Tensor) and self.alpha.requires_grad:
            return self.q, self.k, self.v, self.alpha
        return self.q, self.k, self.v

    def part(self, start: int, stop: int) -> "Workload":
        """Tokens start ... stop - 1 as inputs of their own (contiguous copies), with what of the documents is there."""
        q, k, v = (
            x.detach()[:, :, start:stop].clone(memory_format=torch.contiguous_format) for x in self.inputs(False)
        )
        lengths = None if self.cu_seqlens is None else self.cu_seqlens.clamp(start, stop) - start
        return replace(self, q=q, k=k, v=v, cu_seqlens=lengths)

    def documents(self) -> list["Workload"]:
        """Each packed document as a workload without cu_seqlens. Synchronises."""
        assert self.cu_seqlens is not None
        parts = [self.part(a, b) for a, b in pairwise(self.cu_seqlens.tolist()) if b > a]
        return [replace(part, cu_seqlens=None) for part in parts]


def packed(workload: Workload, lengths: Sequence[int]) -> Workload:
    """The same tensors, packed documents of these lengths."""
    bounds = torch.tensor([0, *lengths], device=workload.q.device).cumsum(0).to(torch.int32)
    return replace(workload, cu_seqlens=bounds)


def load_qkv(path: str | Path, device: str | torch.device, dtype: torch.dtype) -> Workload:
    """A file of benchmarks.dump_qkv: a dict of q (1, H, T, D), k and v (1, G, T, D), alpha (H,) or a number, and
    alibi_slopes (H,) or None. alpha becomes a leaf that requires grad, as in training."""
    return _workload(torch.load(path, map_location=device, weights_only=True), Path(path), device, dtype)


def load_layers(path: str | Path, device: str | torch.device, dtype: torch.dtype) -> list[Workload]:
    """load_qkv for each layer of a file of benchmarks.dump_qkv --layer all (or for the one of another file)."""
    content = torch.load(path, map_location=device, weights_only=True)
    return [_workload(layer, Path(path), device, dtype) for layer in content.get("layers", [content])]


def _workload(content: dict[str, Any], path: Path, device: str | torch.device, dtype: torch.dtype) -> Workload:
    missing = sorted({"q", "k", "v", "alpha"} - set(content))
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: expected a file of python -m benchmarks.dump_qkv")
    q, k, v = (content[name].to(dtype).contiguous() for name in "qkv")
    alpha = torch.as_tensor(content["alpha"], dtype=torch.float32, device=device).expand(q.shape[1]).clone()
    slopes = content.get("alibi_slopes")
    slopes = None if slopes is None else slopes.float()
    return Workload(path.stem, q, k, v, alpha=alpha.requires_grad_(), alibi_slopes=slopes)
