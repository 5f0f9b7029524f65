"""Scores with mean keys of blocks against their definition: errors, gradients, documents, odd inputs; as an operator.

The Triton kernels run on CUDA where there is one, else in Triton's interpreter (TRITON_INTERPRET=1, at small sizes).
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import block_mean_scores
from kernels.block_means.operator import scores_operator
from tests.kernels.helpers import CUDA, DEVICE, EPS, assert_same, check_any_strides, draw, needs_cuda, needs_triton
from tests.kernels.operators import (
    WRAPPERS,
    check_same_bits,
    check_second_derivatives_are_refused,
    check_transforms_are_refused,
)

BACKENDS = [pytest.param("triton", marks=needs_triton), "torch"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("scores", "dq", "dk")
SLOPES = (1.0, 0.5, 0.0, 0.02)


@dataclass(frozen=True)
class Shape:
    """documents: lengths, or None for one document of all keys, whose last ones the queries are; with `ragged` a batch
    row has 5 fewer than the one before."""

    n_queries: int
    n_keys: int
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
        n_blocks = -(-max(self.documents or (self.n_keys,)) // self.block_size)
        return dict(block_size=self.block_size, n_blocks=n_blocks, scale=self.scale, alibi_slopes=slopes)

    def places(self) -> tuple[Tensor, ...]:
        """first_key, own_key, block_start, block_ends, by loops."""
        size, start, block_start, block_ends, begins = self.block_size, 0, [], [], []
        for length in self.documents or (self.n_keys,):
            begins += [start] * length
            block_start += [start + i // size * size for i in range(length)]
            block_ends += [start + i for i in range(length) if i % size == size - 1]
            start += length
        own = torch.arange(self.n_keys - self.n_queries, self.n_keys).repeat(self.batch if self.ragged else 1, 1)
        own -= 5 * torch.arange(len(own))[:, None]
        first = torch.tensor(begins)[own.clamp(min=0)]
        ends = torch.tensor([*block_ends, -1], dtype=torch.int32)
        return tuple(x.to(DEVICE) for x in (first, own, torch.tensor(block_start, dtype=torch.int32), ends))

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and a cotangent."""
        q = draw(self.batch, self.heads, self.n_queries, self.head_dim, seed=seed, dtype=dtype)
        k = draw(self.batch, self.kv_heads, self.n_keys, self.head_dim, seed=seed + 1, dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        return q, k, draw(*q.shape[:3], self.options["n_blocks"], seed=seed + 2, dtype=wide)


SHAPES = {
    "causal": Shape(101, 101, batch=2),
    "grouped by three": Shape(70, 70, heads=3, kv_heads=1),
    "head dim of no power of two": Shape(70, 70, heads=2, head_dim=24),
    "wide heads": Shape(70, 70, heads=2, head_dim=80),
    "blocks of 64": Shape(200, 200, block_size=64, heads=2, kv_heads=1),
    "documents": Shape(150, 150, documents=(5, 70, 1, 16, 58)),
    "documents of blocks of 64": Shape(230, 230, documents=(90, 3, 137), block_size=64, heads=2, kv_heads=1),
    "alibi": Shape(90, 90, slopes=SLOPES),
    "alibi documents": Shape(90, 90, documents=(33, 57), slopes=SLOPES, scale=1.3),
    "chunk": Shape(40, 131),
    "decode": Shape(1, 90, batch=3, ragged=True),
    "many queries of rows of several lengths": Shape(70, 120, batch=2, ragged=True),
    "some queries see nothing": Shape(60, 60, batch=3, ragged=True),
    "odd blocks": Shape(75, 75, block_size=9),
    "blocks of several tiles": Shape(210, 210, block_size=80, heads=2, kv_heads=1),
    "one key a block": Shape(80, 80, block_size=1),
    "one block": Shape(70, 70, block_size=100),
}
LARGE_SHAPES = {
    "64": Shape(2111, 2111, block_size=64, head_dim=64),
    "96": Shape(1500, 1500, block_size=32, heads=8, head_dim=96, slopes=(0.1, 0.02, 0, 0, 0, 0, 0, 0)),
    "128": Shape(2111, 2111, block_size=64, heads=8, head_dim=128, documents=(1000, 3, 1108)),
    "256": Shape(1111, 1311, block_size=128, heads=2, head_dim=256),
    "decode": Shape(1, 4000, block_size=64, heads=8, head_dim=128, batch=3, ragged=True),
}


def results(
    function: Any, inputs: tuple[Tensor, ...], dtype: torch.dtype, *more: Any, **options: Any
) -> tuple[Tensor, ...]:
    """Scores, 0 where they are -inf, dq and dk, on the same (rounded) values in `dtype`."""
    q, k = (x.detach().to(dtype).requires_grad_() for x in inputs[:2])
    scores = function(q, k, *more, **options)
    assert not bool(scores.isnan().any())
    seen = scores.detach() != -torch.inf
    grad = inputs[2].to(scores.dtype)
    return scores.detach().where(seen, 0), *torch.autograd.grad(scores, (q, k), grad)


def plain(
    q: Tensor, k: Tensor, first: Tensor, own: Tensor, start: Tensor, ends: Tensor, block_size: int, n_blocks: int,
    scale: float | None, alibi_slopes: Tensor | None,
) -> Tensor:  # fmt: skip
    """With a mean key for each query and block, in the products' dtype."""
    wide = torch.promote_types(q.dtype, torch.float32)
    key, block = torch.arange(k.shape[2], device=q.device), torch.arange(n_blocks, device=q.device)
    begin = first[:, :, None] + block * block_size  # [b, n, C]
    last = torch.minimum(begin + block_size - 1, own[:, :, None])
    inside = (key >= begin[..., None]) & (key <= last[..., None])  # [b, n, C, keys]
    share = inside.to(wide) / inside.sum(-1, keepdim=True).clamp(min=1)
    means = torch.einsum("bick,bgkd->bgicd", share.expand(len(k), *share.shape[1:]), k.to(wide))
    means = means.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q.to(wide)[:, :, :, None] * means).sum(-1) * (q.shape[3] ** -0.5 if scale is None else scale)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(wide)[:, None, None] * (own[:, :, None] - last)[:, None]
    return scores.masked_fill((begin > own[..., None])[:, None], -torch.inf)


def check(shape: Shape, dtype: torch.dtype, backend: str, seed: int = 0) -> None:
    """Scores within 2x, gradients within 3x of what plain PyTorch loses, and two roundings of every result, and of a
    score one of each of its two terms, products and distance."""
    inputs, places = shape.tensors(dtype, seed), shape.places()
    truth = results(plain, inputs, torch.float64, *places, **shape.options)
    theirs = results(plain, inputs, dtype, *places, **shape.options)
    ours = results(block_mean_scores, inputs, dtype, *places, backend=backend, **shape.options)
    for name, mine, other, true in zip(NAMES, ours, theirs, truth, strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        unit = EPS if name == "scores" else torch.finfo(dtype).eps / 2
        allowed = (2 if name == "scores" else 3) * (other.double() - true).norm() + 2 * unit * true.norm()
        error = (mine.double() - true).norm()
        assert error <= allowed, f"{name}: {error:.3e} > {allowed:.3e}, norm {true.norm():.3e}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES if CUDA else DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_loses_what_plain_pytorch_loses(shape: Shape, dtype: torch.dtype, backend: str) -> None:
    check(shape, dtype, backend)


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE_SHAPES.values(), ids=LARGE_SHAPES)
def test_at_length(shape: Shape, dtype: torch.dtype) -> None:
    """Against the reference, whose errors the other tests bound; `plain` holds a mean for each query."""
    if shape.head_dim > 128 and dtype == torch.float32:
        pytest.skip("not a case of the kernel")
    inputs, places = shape.tensors(dtype), shape.places()
    ours, theirs, truth = (
        results(block_mean_scores, inputs, kind, *places, backend=backend, **shape.options)
        for kind, backend in ((dtype, "triton"), (dtype, "torch"), (torch.float64, "torch"))
    )
    for name, mine, other, true in zip(NAMES, ours, theirs, truth, strict=True):
        unit = EPS if name == "scores" else torch.finfo(dtype).eps / 2
        allowed = (2 if name == "scores" else 3) * (other.double() - true).norm() + 2 * unit * true.norm()
        assert (mine.double() - true).norm() <= allowed, name


@pytest.mark.parametrize("name", ["alibi documents", "grouped by three", "odd blocks", "documents"])
def test_definition_written_out(name: str) -> None:
    """The reference against loops that share nothing with it."""
    shape = SHAPES[name]
    (q, k, _), (first, own, *more) = shape.tensors(torch.float64), shape.places()
    scores = block_mean_scores(q, k, first, own, *more, backend="torch", **shape.options)
    scale, size = shape.scale or q.shape[3] ** -0.5, shape.block_size
    for h in range(shape.heads):
        slope = 0.0 if shape.slopes is None else float(shape.options["alibi_slopes"][h])  # in float32
        for i in range(shape.n_queries):
            at, start, expected = int(own[0, i]), int(first[0, i]), []
            for begin in range(start, at + 1, size):
                keys = range(begin, min(begin + size, at + 1))
                mean = sum(k[0, h * shape.kv_heads // shape.heads, j] for j in keys) / len(keys)
                expected.append(float(q[0, h, i] @ mean) * scale - slope * (at - keys[-1]))
            expected += [-torch.inf] * (scores.shape[3] - len(expected))
            wanted = torch.tensor(expected, dtype=torch.float64, device=DEVICE)
            torch.testing.assert_close(scores[0, h, i], wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_documents_change_nothing(backend: str) -> None:
    """In scores and in gradients."""
    shape = Shape(100, 100, documents=(40, 60))
    q, k, grad = shape.tensors(torch.float32)
    places = shape.places()
    whole = results(block_mean_scores, (q, k, grad), torch.float32, *places, backend=backend, **shape.options)
    k, grad = k.clone(), grad.clone()
    k[:, :, 40:] = k[:, :, 40:] + 9
    grad[:, :, 40:] = 9
    other = results(block_mean_scores, (q, k, grad), torch.float32, *places, backend=backend, **shape.options)
    for one, changed in zip(whole, other, strict=True):
        assert_same(one[:, :, :40], changed[:, :, :40], backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_reaches_only_what_sees_it(value: float, backend: str) -> None:
    """Of keys: their blocks, from there on, and the gradients of these queries; of queries: keys that they see."""
    shape = Shape(100, 100, documents=(40, 60))
    (q, k, grad), places = shape.tensors(torch.float32), shape.places()

    def run(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (q, k)]
        scores = block_mean_scores(*leaves, *places, backend=backend, **shape.options)
        return scores.detach(), *torch.autograd.grad(scores, leaves, grad)

    scores, dq, dk = run(q, k)
    spoilt = torch.zeros_like(scores, dtype=torch.bool)
    bad = k.clone()
    for key, start, block in ((20, 0, 1), (45, 40, 0), (99, 40, 3)):
        bad[:, key % 2, key, 3] = value
        spoilt[:, 2 * (key % 2) : 2 * (key % 2) + 2, key : 40 if start == 0 else 100, block] = True
    found, found_dq, found_dk = run(q, bad)
    assert torch.equal(found.isfinite() | (found == -torch.inf), ~spoilt) and bool(found[spoilt].isnan().all())
    torch.testing.assert_close(found.where(~spoilt, 0), scores.where(~spoilt, 0))
    rows = spoilt.any(-1)
    assert torch.equal(found_dq.isfinite().all(-1), ~rows)
    torch.testing.assert_close(found_dq[~rows], dq[~rows])
    good = bad.isfinite().all(-1)
    torch.testing.assert_close(found_dk[good], dk[good])  # linear in queries alone
    bad = q.clone()
    bad[:, :2, 50, 3] = value
    found, found_dq, found_dk = run(bad, k)
    key = torch.arange(100, device=DEVICE)
    others, hidden = key != 50, (key < 40) | (key > 50)
    torch.testing.assert_close((found[:, :, others], found_dq[:, :, others]), (scores[:, :, others], dq[:, :, others]))
    assert torch.equal(found_dk.isfinite().all(-1)[0], torch.stack([hidden, hidden | True]))
    torch.testing.assert_close(found_dk[:, 0, hidden], dk[:, 0, hidden])


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_may_be_float32(backend: str) -> None:
    """Beside queries of 16 bits: the same scores of the same values, and gradients of keys in float32."""
    shape = SHAPES["documents"]
    q, k, grad = shape.tensors(torch.bfloat16)
    found = []
    for keys in (k, k.float()):
        leaf = keys.requires_grad_()
        scores = block_mean_scores(q, leaf, *shape.places(), backend=backend, **shape.options)
        found.append((scores.detach(), *torch.autograd.grad(scores, leaf, grad)))
    assert found[1][1].dtype == torch.float32
    assert_same(found[0][0], found[1][0], backend)
    assert_same(found[0][1], found[1][1].bfloat16(), backend)


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_any_strides_give_the_same_bits(backend: str) -> None:
    shape = SHAPES["alibi documents"]
    inputs, places = shape.tensors(torch.float32), shape.places()

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return results(block_mean_scores, tensors, torch.float32, *places, backend=backend, **shape.options)

    check_any_strides(run, inputs)


@pytest.mark.parametrize("backend", BACKENDS[:1])
@settings(max_examples=12)
@given(
    n_keys=st.integers(1, 120), n_queries=st.integers(1, 80), size=st.integers(1, 40), repeat=st.integers(1, 3),
    cut=st.floats(0, 1), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_sizes(n_keys: int, n_queries: int, size: int, repeat: int, cut: float, seed: int, backend: str) -> None:
    documents = (int(cut * n_keys), n_keys - int(cut * n_keys))
    shape = Shape(min(n_queries, n_keys), n_keys, size, heads=repeat, kv_heads=1, documents=documents)
    inputs, places = shape.tensors(torch.float32, seed), shape.places()
    ours, theirs = (
        results(block_mean_scores, inputs, torch.float32, *places, backend=b, **shape.options)
        for b in (backend, "torch")
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(first_key=torch.zeros(6)), "first_key must be torch.int32 or torch.int64 on cpu, got torch.float32"),
        (dict(own_key=torch.zeros(6).int()), r"own_key must be \(1, 6\), got \(6,\)"),
        (dict(block_start=torch.zeros(6)), "block_start must be torch.int32 on cpu, got torch.float32"),
        (dict(block_start=torch.zeros(5).int()), r"block_start must be \(6,\) .*, got block_start \(5,\)"),
        (dict(block_size=0), "block_size must lie in 1 ... 1048576, got 0"),
        (dict(n_blocks=-1), "n_blocks must be at least 0, got -1"),
        (dict(first_key=torch.full((1, 6), -3)), "first_key must be at least 0, got -3"),
        (dict(own_key=torch.full((1, 6), 6)), "own_key must lie below the number of keys, 6, got 6"),
        (dict(block_start=torch.full((6,), 99).int()), "block_start must lie in -1 ... 5, got 99 ... 99"),
        (dict(block_ends=torch.tensor([5, 6]).int()), "block_ends must lie in -1 ... 5, got 5 ... 6"),
        (dict(scale=-1.0), "scale must be positive"),
        (dict(backend="flex"), "backend must be one of auto, triton, torch, got 'flex'"),
    ],
)
def test_errors_name_the_value(changes: dict[str, Any], message: str) -> None:
    q, k, _ = (x.cpu() for x in Shape(6, 6).tensors(torch.float32))
    own = torch.arange(6)[None]
    usual = dict(
        first_key=torch.zeros_like(own), own_key=own, block_start=torch.arange(6).int() // 2 * 2,
        block_ends=torch.tensor([1, 3, 5]).int(), block_size=2, n_blocks=3,
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        block_mean_scores(q, k, **usual | changes)


class TestOperator:
    pytestmark = needs_triton
    shape = SHAPES["alibi documents"]

    def score(self, *inputs: Tensor) -> Tensor:
        return block_mean_scores(*inputs, backend="triton", **self.shape.options)

    def test_is_sound(self) -> None:
        shape = Shape(9, 9, slopes=SLOPES, block_size=4)
        q, k, _ = (x.requires_grad_() for x in shape.tensors(torch.float32))
        slopes = torch.tensor(SLOPES, device=DEVICE)
        names = ("test_schema", "test_faketensor")  # gradients of -inf - -inf are none
        torch.library.opcheck(scores_operator, (q, k, *shape.places(), slopes, 4, 3, 0.25), test_utils=names)

    @pytest.mark.parametrize("wrap", WRAPPERS)
    def test_same_bits_where_it_is(self, wrap: Any) -> None:
        inputs, places = self.shape.tensors(torch.float32), self.shape.places()
        check_same_bits(wrap, self.score, lambda f: results(f, inputs, torch.float32, *places))

    @pytest.mark.parametrize("check", [check_second_derivatives_are_refused, check_transforms_are_refused])
    def test_what_is_refused(self, check: Any) -> None:
        inputs, places = self.shape.tensors(torch.float32), self.shape.places()
        check(lambda q: self.score(q, inputs[1], *places)[..., 0], inputs[0])
