"""What the tests of attention over selected blocks share: shapes, selections, the same in plain PyTorch."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import selected_block_attention
from tests.kernels.helpers import DEVICE, EPS, NAMES, draw


@dataclass(frozen=True)
class Shape:
    """documents: lengths, or None for one document of all keys, whose last ones the queries are."""

    n_queries: int
    n_keys: int
    count: int = 3
    block_size: int = 16
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    batch: int = 1
    documents: tuple[int, ...] | None = None
    ragged: bool = False
    slopes: tuple[float, ...] | None = None
    scale: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        slopes = None if self.slopes is None else torch.tensor(self.slopes, device=DEVICE)
        n_blocks = None
        if self.documents is not None:
            n_blocks = self.n_keys // self.block_size + len(self.documents)
        return dict(block_size=self.block_size, n_blocks=n_blocks, scale=self.scale, alibi_slopes=slopes)

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and a cotangent."""
        heads = [(self.heads, self.n_queries), *[(self.kv_heads, self.n_keys)] * 2, (self.heads, self.n_queries)]
        q, k, v, grad = (
            draw(self.batch, *size, self.head_dim, seed=4 * seed + i, dtype=dtype) for i, size in enumerate(heads)
        )
        return q, k, v, grad

    def selection(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """first_key and own_key: of each query random blocks of its document up to its own, some of them none; the
        first query of all has none at all, the second the block behind its own, of which it sees nothing."""
        generator = torch.Generator().manual_seed(seed)
        bounds = [0, *torch.tensor(self.documents or (self.n_keys,)).cumsum(0).tolist()]
        rows = self.batch if self.ragged else 1
        own = torch.arange(self.n_keys - self.n_queries, self.n_keys).clamp(min=-1).repeat(rows, 1)
        own -= 5 * torch.arange(rows)[:, None]
        first = torch.full((self.batch, self.kv_heads, self.n_queries, self.count), -1, dtype=torch.int32)
        for b in range(self.batch):
            for i in range(self.n_queries):
                at = int(own[b % rows, i])
                start = max((x for x in bounds if x <= at), default=None)
                if start is None:
                    continue
                blocks = torch.arange(start, at + 1, self.block_size)
                for g in range(self.kv_heads):
                    chosen = blocks[torch.randperm(len(blocks), generator=generator)[: self.count]]
                    first[b, g, i, : len(chosen)] = chosen
                    first[b, g, i] = first[b, g, i, torch.randperm(self.count, generator=generator)]
        first[:, :, 0] = -1
        if self.n_queries > 1:
            behind = int(own[0, 1]) // self.block_size * self.block_size + self.block_size
            first[0, 0, 1] = -1
            first[0, 0, 1, 0] = behind if behind < self.n_keys and self.documents is None else -1
        return first.to(DEVICE), own.to(DEVICE)


SHAPES = {
    "causal": Shape(101, 101, batch=2),
    "grouped by three": Shape(70, 70, heads=3, kv_heads=1, count=4),
    "one head a group": Shape(70, 70, heads=2, head_dim=24),
    "chunk": Shape(40, 131, count=5),
    "decode": Shape(1, 90, batch=3, ragged=True),
    "few queries of rows of several lengths": Shape(3, 120, batch=2, ragged=True, count=6),
    "documents": Shape(120, 120, documents=(5, 40, 1, 16, 58)),
    "alibi": Shape(90, 90, slopes=(1.0, 0.5, 0.0, 0.02)),
    "alibi documents": Shape(90, 90, documents=(33, 57), slopes=(1.0, 0.5, 0.0, 0.02), scale=1.3),
    "odd blocks": Shape(75, 75, block_size=9),
    "blocks of several tiles": Shape(210, 210, block_size=80, count=2),
    "one key a block": Shape(30, 30, block_size=1, count=7),
    "more queries than keys": Shape(60, 40),
    "all blocks": Shape(64, 64, count=4),
}
LARGE_SHAPES = {
    "64": Shape(2111, 2111, count=8, block_size=64, head_dim=64),
    "96": Shape(1500, 1500, count=8, block_size=32, heads=8, head_dim=96, slopes=(0.1, 0.02, 0, 0, 0, 0, 0, 0)),
    "128": Shape(2111, 2111, count=8, block_size=64, heads=8, head_dim=128, documents=(1000, 3, 1108)),
    "256": Shape(1111, 1311, count=4, block_size=128, heads=2, head_dim=256),
    "decode": Shape(4, 4000, count=16, block_size=64, heads=8, head_dim=128, batch=3, ragged=True),
}


def weights_of_keys(first_key: Tensor, own_key: Tensor, block_size: int, n_keys: int) -> Tensor:
    """int64 (B, G, n, keys): how often each query reads each key."""
    offset = torch.arange(block_size, device=first_key.device)
    key = first_key[..., None].long() + offset  # [B, G, n, count, size]
    seen = (first_key >= 0)[..., None] & (key <= own_key[:, None, :, None, None]) & (key < n_keys)
    counts = torch.zeros(*first_key.shape[:3], n_keys, dtype=torch.int64, device=first_key.device)
    return counts.scatter_add_(-1, key.clamp(0, n_keys - 1).flatten(3), seen.long().flatten(3))


def plain(
    q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, own_key: Tensor, block_size: int, n_blocks: int | None,
    scale: float | None, alibi_slopes: Tensor | None,
) -> Tensor:  # fmt: skip
    """What plain PyTorch gives in the inputs' dtype, with all scores and a mask: products and weights are rounded."""
    repeat, n_keys = q.shape[1] // k.shape[1], k.shape[2]
    counts = weights_of_keys(first_key, own_key, block_size, n_keys).repeat_interleave(repeat, 1)
    assert int(counts.max()) <= 1
    k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q @ k.mT).to(wide) * (q.shape[3] ** -0.5 if scale is None else scale)
    if alibi_slopes is not None:
        distance = own_key[:, :, None] - torch.arange(n_keys, device=q.device)
        scores = scores - alibi_slopes.to(wide)[:, None, None] * distance[:, None]
    some = counts.any(-1, keepdim=True)
    p = scores.masked_fill((counts == 0) & some, -torch.inf).softmax(-1) * some
    return p.to(v.dtype) @ v


def results(
    function: Any, inputs: tuple[Tensor, ...], dtype: torch.dtype, *more: Any, gradients: bool = True, **options: Any
) -> tuple[Tensor, ...]:
    """Output and, with gradients, dq, dk, dv, on the same (rounded) values in `dtype`. inputs: q, k, v, cotangent."""
    q, k, v, grad = (x.detach().to(dtype).requires_grad_(gradients) for x in inputs)
    out = function(q, k, v, *more, **options)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), grad.detach())) if gradients else (out,)


def check(shape: Shape, dtype: torch.dtype, backend: str, *, gradients: bool = True, seed: int = 0) -> None:
    """The output within 2x, gradients within 3x of what plain PyTorch loses in that dtype; in float32 also two
    roundings of every result, and one of each term of dq and dk: in p (dP - delta) the difference may cancel."""
    inputs, selection = shape.tensors(dtype, seed), shape.selection(seed)
    options = shape.options | dict(gradients=gradients)
    truth = results(plain, inputs, torch.float64, *selection, **options)
    theirs = results(plain, inputs, dtype, *selection, **options)
    ours = results(selected_block_attention, inputs, dtype, *selection, backend=backend, **options)
    q, k, v, grad = (x.double() for x in inputs)
    terms = (q.shape[3] ** -0.5 if shape.scale is None else shape.scale) * grad.norm() * v.square().mean().sqrt()
    cancelled = (0.0, float(terms * k.norm(dim=-1).mean()), float(terms * q.norm(dim=-1).mean()), 0.0)
    for name, mine, other, true, more in zip(NAMES, ours, theirs, truth, cancelled, strict=False):
        assert mine.dtype == dtype
        allowed = (2 if name == "out" else 3) * (other.double() - true).norm()
        if dtype == torch.float32:
            allowed += EPS * (2 * true.norm() + more)
        error = (mine.double() - true).norm()
        assert error <= allowed, f"{name}: {error:.3e} > {allowed:.3e}, norm {true.norm():.3e}"
