"""What the tests of attention with a bias for each block share: shapes, biases, the same in plain PyTorch."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import block_bias_attention
from tests.kernels.helpers import DEVICE, EPS, draw, weight_rounding

NAMES = ("out", "dq", "dk", "dv", "dbias")


@dataclass(frozen=True)
class Shape:
    """documents: lengths, or None for one document of all keys, whose last ones the queries are; with `ragged` a batch
    row has 5 fewer than the one before. live: share of blocks that are read."""

    n_queries: int
    n_keys: int
    block_size: int = 16
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    batch: int = 1
    documents: tuple[int, ...] | None = None
    ragged: bool = False
    live: float = 0.4
    slopes: tuple[float, ...] | None = None
    scale: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        slopes = None if self.slopes is None else torch.tensor(self.slopes, device=DEVICE)
        return dict(block_size=self.block_size, scale=self.scale, alibi_slopes=slopes)

    def positions(self) -> tuple[Tensor, Tensor]:
        """first_key and own_key."""
        rows = self.batch if self.ragged else 1
        own = torch.arange(self.n_keys - self.n_queries, self.n_keys).clamp(min=-1).repeat(rows, 1)
        own -= 5 * torch.arange(rows)[:, None]
        bounds = torch.tensor([0, *(self.documents or (self.n_keys,))]).cumsum(0)
        first = bounds[torch.searchsorted(bounds, own.clamp(min=0), right=True) - 1]
        return first.to(DEVICE), own.clamp(min=-1).to(DEVICE)

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
        """q, k, v, bias and a cotangent. A block has a bias of -inf or one around -2, what no query sees NaN; the first
        query reads no block."""
        sizes = [(self.heads, self.n_queries), *[(self.kv_heads, self.n_keys)] * 2, (self.heads, self.n_queries)]
        q, k, v, grad = (
            draw(self.batch, *size, self.head_dim, seed=4 * seed + i, dtype=dtype) for i, size in enumerate(sizes)
        )
        first, own = self.positions()
        n_blocks = -(-max(self.documents or (self.n_keys,)) // self.block_size)
        wide = torch.promote_types(dtype, torch.float32)
        bias = draw(self.batch, self.heads, self.n_queries, n_blocks, seed=seed + 100, dtype=wide) - 2
        dead = torch.rand(bias.shape, generator=torch.Generator().manual_seed(seed)) >= self.live
        bias.masked_fill_(dead.to(DEVICE), -torch.inf)
        last = (own - first)[:, None, :, None] // self.block_size
        bias.masked_fill_(torch.arange(n_blocks, device=DEVICE) > last, torch.nan)
        bias[:, :, :1] = -torch.inf
        return q, k, v, bias, grad


SHAPES = {
    "causal": Shape(101, 101, batch=2),
    "grouped by three": Shape(70, 70, heads=3, kv_heads=1),
    "head dim of no power of two": Shape(70, 70, heads=2, head_dim=24),
    "blocks of 64": Shape(200, 200, block_size=64, heads=2, kv_heads=1),
    "documents": Shape(150, 150, documents=(5, 70, 1, 16, 58)),
    "documents of blocks of 64": Shape(230, 230, documents=(90, 3, 137), block_size=64, heads=2, kv_heads=1),
    "alibi": Shape(90, 90, slopes=(1.0, 0.5, 0.0, 0.02)),
    "alibi documents": Shape(90, 90, documents=(33, 57), slopes=(1.0, 0.5, 0.0, 0.02), scale=1.3),
    "chunk": Shape(40, 131),
    "decode": Shape(1, 90, batch=3, ragged=True, live=0.9),
    "few queries of rows of several lengths": Shape(3, 120, batch=2, ragged=True),
    "many queries of rows of several lengths": Shape(70, 120, batch=2, ragged=True),
    "odd blocks": Shape(75, 75, block_size=9),
    "blocks of several tiles": Shape(210, 210, block_size=80, heads=2, kv_heads=1),
    "one key a block": Shape(40, 40, block_size=1),
    "one block": Shape(70, 70, block_size=100, live=0.9),
    "more queries than keys": Shape(60, 40),
    "all blocks": Shape(80, 80, live=1.0),
    "few blocks": Shape(150, 150, live=0.02, heads=2),
    "no block": Shape(70, 70, live=0.0),
}
LARGE_SHAPES = {
    "64": Shape(2111, 2111, block_size=64, head_dim=64),
    "96": Shape(1500, 1500, block_size=32, heads=8, head_dim=96, slopes=(0.1, 0.02, 0, 0, 0, 0, 0, 0)),
    "128": Shape(2111, 2111, block_size=64, heads=8, head_dim=128, documents=(1000, 3, 1108)),
    "256": Shape(1111, 1311, block_size=128, heads=2, head_dim=256, live=0.1),
    "decode": Shape(1, 4000, block_size=64, heads=8, head_dim=128, batch=3, ragged=True),
}


def plain(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, first_key: Tensor, own_key: Tensor, block_size: int,
    scale: float | None, alibi_slopes: Tensor | None,
) -> Tensor:  # fmt: skip
    """What plain PyTorch gives in the inputs' dtype, with all scores and a mask: products and weights are rounded."""
    repeat, key = q.shape[1] // k.shape[1], torch.arange(k.shape[2], device=q.device)
    k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    first, own = first_key[:, None, :, None], own_key[:, None, :, None]
    scores = (q @ k.mT).to(wide) * (q.shape[3] ** -0.5 if scale is None else scale)
    block = (key - first).clamp(min=0) // block_size
    added = bias.gather(-1, block.clamp(max=bias.shape[3] - 1).expand_as(scores))
    read = (key >= first) & (key <= own) & (added != -torch.inf)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(wide)[:, None, None] * (own - key)
    some = read.any(-1, keepdim=True)
    scores = scores + torch.where(read, added, 0)
    p = scores.masked_fill(~read & some, -torch.inf).softmax(-1) * some
    return p.to(v.dtype) @ v


def results(
    function: Any, inputs: tuple[Tensor, ...], dtype: torch.dtype, *more: Any, gradients: bool = True, **options: Any
) -> tuple[Tensor, ...]:
    """Output and, with gradients, dq, dk, dv, dbias, on the same (rounded) values in `dtype`. inputs: q, k, v, bias,
    cotangent."""
    *tensors, grad = inputs
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [x.detach().to(wide if i == 3 else dtype).requires_grad_(gradients) for i, x in enumerate(tensors)]
    out = function(*leaves, *more, **options)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))) if gradients else (out,)


def check(shape: Shape, dtype: torch.dtype, backend: str, *, gradients: bool = True, seed: int = 0) -> None:
    """The output within 2x, gradients within 3x of what plain PyTorch loses in that dtype; in float32 also two
    roundings of every result, one of each term of dq, dk and dbias: in p (dP - delta) the difference may cancel, and
    what CUDA's powers lose of each term of dv.

    delta = dO . out is made of the output, so that each of its D terms is off by the output's rounding (half a unit of
    its dtype). In dq and dk roundings of as many terms hide that. A bias's gradient is a sum over its block's keys, of
    which delta is off for all alike, and weights sum to 1: the norm of dO * out times that rounding is added to it."""
    inputs, positions = shape.tensors(dtype, seed), shape.positions()
    options = shape.options | dict(gradients=gradients)
    truth = results(plain, inputs, torch.float64, *positions, **options)
    theirs = results(plain, inputs, dtype, *positions, **options)
    ours = results(block_bias_attention, inputs, dtype, *positions, backend=backend, **options)
    q, k, v, _, grad = (x.double() for x in inputs)
    terms = grad.norm() * v.square().mean().sqrt()
    scaled = terms * (q.shape[3] ** -0.5 if shape.scale is None else shape.scale)
    lengths = [float(x.norm(dim=-1).mean()) for x in (k, q)]
    cancelled = (0.0, float(scaled) * lengths[0], float(scaled) * lengths[1], 0.0, float(terms))
    for name, mine, other, true, more in zip(NAMES, ours, theirs, truth, cancelled, strict=False):
        assert mine.dtype == other.dtype
        allowed = (2 if name == "out" else 3) * (other.double() - true).norm()
        if dtype == torch.float32:
            allowed += EPS * (2 * true.norm() + more)
            if name == "dv":
                absolute = results(plain, (*inputs[:4], inputs[4].abs()), torch.float64, *positions, **options)[3]
                allowed += weight_rounding(shape.n_keys) * absolute.norm()
        if name == "dbias":
            allowed += torch.finfo(dtype).eps / 2 * (grad * truth[0]).norm()
        error = (mine.double() - true).norm()
        assert error <= allowed, f"{name}: {error:.3e} > {allowed:.3e}, norm {true.norm():.3e}"
