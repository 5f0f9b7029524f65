"""What the tests of the lightning indexer share: shapes, inputs, the loss with whole matrices in plain PyTorch."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.kernels.helpers import DEVICE, EPS, draw, weight_rounding

NAMES = ("loss", "dq", "dk", "dweights")


@dataclass(frozen=True)
class Shape:
    """documents: lengths, or None for one document of all keys, whose last ones the queries are. density: of the keys
    that are chosen, None for all. ragged: batch rows stand at other places."""

    n_queries: int
    n_keys: int
    index_heads: int = 3
    index_dim: int = 12
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 20
    batch: int = 1
    documents: tuple[int, ...] | None = None
    density: float | None = None
    ragged: bool = False
    slopes: tuple[float, ...] | None = None
    scale: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        slopes = None if self.slopes is None else torch.tensor(self.slopes, device=DEVICE)
        return dict(scale=self.scale, alibi_slopes=slopes)

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
        """index_q, index_k, weights, q, k."""
        sizes = [
            (self.index_heads, self.n_queries, self.index_dim),
            (self.n_keys, self.index_dim),
            (self.index_heads, self.n_queries),
            (self.heads, self.n_queries, self.head_dim),
            (self.kv_heads, self.n_keys, self.head_dim),
        ]
        return tuple(draw(self.batch, *size, seed=5 * seed + i, dtype=dtype) for i, size in enumerate(sizes))

    def rows(self) -> tuple[Tensor, Tensor]:
        """first_key, own_key: int64 (B or 1, n)."""
        rows = self.batch if self.ragged else 1
        own = torch.arange(self.n_keys - self.n_queries, self.n_keys).repeat(rows, 1)
        own -= 5 * torch.arange(rows)[:, None]
        starts = torch.tensor([0, *(self.documents or ())]).cumsum(0)
        first = starts[(torch.searchsorted(starts, own, right=True) - 1).clamp(min=0)]
        return first.to(DEVICE), own.to(DEVICE)

    def chosen(self, seed: int = 0) -> Tensor | None:
        """Bits at random, also of keys that are not visible; always a query's own key, and one query has no other."""
        if self.density is None:
            return None
        generator = torch.Generator().manual_seed(seed)
        width = -(-self.n_keys // 8) * 8
        mask = torch.rand(self.batch, self.n_queries, width, generator=generator) < self.density
        mask[:, self.n_queries // 2] = False
        own = self.rows()[1].cpu().clamp(min=0).expand(self.batch, -1)
        mask.scatter_(2, own[..., None], torch.tensor(True).expand(self.batch, self.n_queries, 1))
        return (mask.unflatten(2, (-1, 8)).int() << torch.arange(8)).sum(-1).to(torch.uint8).to(DEVICE)


SHAPES = {
    "causal": Shape(101, 101, batch=2),
    "one query": Shape(1, 1),
    "documents": Shape(150, 150, documents=(5, 40, 1, 16, 88), batch=2),
    "alibi": Shape(90, 90, slopes=(1.0, 0.25, 0.0, 0.02)),
    "chosen": Shape(140, 140, density=0.2, batch=2),
    "chosen of documents": Shape(133, 133, density=0.1, documents=(70, 63), slopes=(1.0, 0.25, 0.0, 0.02), scale=0.4),
    "chunk": Shape(40, 131, density=0.3),
    "rows of several lengths": Shape(20, 100, batch=3, ragged=True),
    "grouped by three": Shape(70, 70, heads=3, kv_heads=1, index_heads=1),
    "as many key heads": Shape(70, 70, heads=2, kv_heads=2, index_heads=6, index_dim=16, head_dim=16),
    "wide indexer": Shape(70, 70, index_dim=72, head_dim=8),
}
LARGE_SHAPES = {
    "30m": Shape(3000, 3000, 4, 32, 8, 4, 64, documents=(1000, 3, 1997)),
    "30m, chosen": Shape(2111, 2111, 4, 32, 8, 4, 64, density=0.3, slopes=(1.0, 0.5, 0.1, 0.02, 0.0, 0.0, 0.0, 0.0)),
    "many heads": Shape(1100, 1100, 64, 128, 16, 2, 128, density=0.5),
    "wide heads": Shape(700, 1300, 8, 64, 2, 1, 256),
}


def seen_of(shape: Shape, chosen: Tensor | None) -> Tensor:
    """bool (B, n, keys)."""
    first, own = shape.rows()
    key = torch.arange(shape.n_keys, device=DEVICE)
    seen = ((key >= first[..., None]) & (key <= own[..., None])).expand(shape.batch, -1, -1)
    if chosen is None:
        return seen
    bits = chosen[..., None].int() >> torch.arange(8, device=DEVICE) & 1
    return seen & bits.flatten(2)[..., : shape.n_keys].bool()


def weights_and_scores(
    index_q: Tensor, index_k: Tensor, weights: Tensor, q: Tensor, k: Tensor, own_key: Tensor, seen: Tensor,
    scale: float | None, alibi_slopes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Attention's mean weights and log softmax(I), (B, n, keys), both 0 where not seen, and ReLU(index_q . index_k),
    (B, J, n, keys). Of 16-bit inputs products are those of float32."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    index_q, index_k, weights, q, k = (x.to(wide) for x in (index_q, index_k, weights, q, k))
    raw = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * (q.shape[3] ** -0.5 if scale is None else scale)
    if alibi_slopes is not None:
        distance = own_key[:, :, None] - torch.arange(k.shape[2], device=q.device)
        raw = raw - alibi_slopes.to(wide)[:, None, None] * distance[:, None]
    some = seen.any(-1, keepdim=True)  # rows that see nothing have no loss
    p = raw.masked_fill((~seen & some)[:, None], -torch.inf).softmax(-1).mean(1).masked_fill(~seen, 0)
    by_head = (index_q @ index_k[:, None].mT).relu()
    scores = (by_head * weights[..., None]).sum(1)
    return p, scores.masked_fill(~seen & some, -torch.inf).log_softmax(-1).masked_fill(~seen, 0), by_head


def plain(*given: Any) -> Tensor:
    """The loss with all scores at once, differentiable by autograd."""
    p, log_q, _ = weights_and_scores(*given)
    return torch.nn.functional.kl_div(log_q, p, reduction="sum")


def results(function: Any, inputs: tuple[Tensor, ...], dtype: torch.dtype, *more: Any, **options: Any) -> list[Tensor]:
    """The loss, and the gradients of three times it, on the same (rounded) values in `dtype`."""
    index, attention = ([x.detach().to(dtype) for x in part] for part in (inputs[:3], inputs[3:]))
    leaves = [x.requires_grad_() for x in index]
    loss = function(*leaves, *attention, *more, **options)
    return [loss.detach(), *torch.autograd.grad(loss * 3, leaves)]


def rounding(inputs: tuple[Tensor, ...], dtype: torch.dtype, truth: list[Tensor], *more: Any) -> list[float]:
    """What kernels may lose beyond plain PyTorch's error, as norms: two float32 roundings of every result, and those of
    terms that cancel, which add up as squares. more: as `weights_and_scores` takes it, behind the inputs.

    A product carries about EPS |q| |k|, a score the sum of that, and its power carries it relatively: so do p and
    softmax(I), which may both be large where their difference, the gradient of I, is small; so do CUDA's powers. The
    logarithm of a row's sum, of the size of its largest score and of that of the keys' number, is off alike for all
    keys. In bfloat16 that difference is rounded to it once, in dq and dk, as attention's backward does. A product
    within 16 roundings of 0 may fall on ReLU's other side.
    """
    index_q, index_k, weights, q, k = (x.double() for x in inputs)
    p, log_q, x = weights_and_scores(index_q, index_k, weights, q, k, *more)
    seen, softmax = more[1], log_q.exp() * more[1]
    product = index_q.norm(dim=-1)[..., None] * index_k.norm(dim=-1)[:, None, None]  # [B, J, n, keys]
    size = (product * weights.abs()[..., None]).sum(1)
    size += (q.norm(dim=-1).amax(1)[..., None] * k.norm(dim=-1).amax(1)[:, None]) * (more[2] or q.shape[3] ** -0.5)
    size = 1 + (size * seen).amax(-1, keepdim=True)
    powers = weight_rounding(k.shape[2])
    off = (EPS * size + powers) * (p + softmax)
    once = off + (torch.finfo(dtype).eps / 2 if dtype == torch.bfloat16 else 0) * (softmax - p).abs()
    doubt = (index_q @ index_k[:, None].mT).abs() <= 16 * EPS * product
    dx = torch.where(doubt, (softmax - p).abs()[:, None], once[:, None] * (x > 0))
    dx = (3 * dx * weights.abs()[..., None]) ** 2
    logarithm = EPS * (size[..., 0] + math.log(k.shape[2])) * p.sum(-1)
    ratio = (p.clamp(min=1e-300).log() - log_q).abs()
    terms = [
        (EPS * p * (size + ratio)).norm() + (powers * (p * (2 + ratio)).sum(-1) + logarithm).norm(),
        (dx @ index_k[:, None] ** 2).sum().sqrt(),
        (dx.mT @ index_q**2).sum().sqrt(),
        3 * (off[:, None] * x).norm(),
    ]
    return [EPS * 2 * float(one.norm()) + float(more) for one, more in zip(truth, terms, strict=True)]


def check_loss(function: Any, shape: Shape, dtype: torch.dtype, seed: int = 0) -> None:
    """The loss within 2x, gradients within 3x of what plain PyTorch loses in that dtype, plus `rounding`. function: as
    `indexer_loss`."""
    inputs, chosen = tuple(x.to(dtype) for x in shape.tensors(torch.float64, seed)), shape.chosen(seed)
    first, own = shape.rows()
    options = shape.options
    more = (own, seen_of(shape, chosen), options["scale"], options["alibi_slopes"])
    truth, theirs = results(plain, inputs, torch.float64, *more), results(plain, inputs, dtype, *more)
    ours = results(function, inputs, dtype, first, own, chosen=chosen, **options)
    assert ours[0].dtype == torch.float32 and all(x.dtype == dtype for x in ours[1:])
    allowed = rounding(inputs, dtype, truth, *more)
    for name, mine, other, true, extra in zip(NAMES, ours, theirs, truth, allowed, strict=True):
        limit = (2 if name == "loss" else 3) * float((other.double() - true).norm()) + extra
        error = float((mine.double() - true).norm())
        assert error <= limit, f"{name}: {error:.3e} > {limit:.3e}, norm {float(true.norm()):.3e}"
