"""Attention over chosen keys by kernels against plain PyTorch with masks: errors, gradients, what is read, odd inputs.

The Triton kernels run on CUDA where there is one, else in Triton's interpreter (TRITON_INTERPRET=1, at small sizes).
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.lightning_indexer.chosen_launches import attention_operator
from kernels.lightning_indexer.indexer import chosen_attention
from tests.kernels.helpers import CUDA, DEVICE, EPS, draw, needs_cuda, needs_triton, weight_rounding
from tests.kernels.helpers import NAMES as OF_ATTENTION
from tests.kernels.lightning_indexer.inputs import LARGE_SHAPES, SHAPES, Shape, seen_of

pytestmark = needs_triton
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CHOSEN = {name: replace(shape, density=shape.density or 0.5) for name, shape in SHAPES.items() if shape.head_dim > 8}
SHAPE = SHAPES["chosen of documents"]


def tensors(shape: Shape, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and a cotangent."""
    *_, q, k = shape.tensors(dtype, seed)
    return q, k, draw(*k.shape, seed=100 + seed, dtype=dtype), draw(*q.shape, seed=200 + seed, dtype=dtype)


def plain(
    q: Tensor, k: Tensor, v: Tensor, own_key: Tensor, seen: Tensor, scale: float | None, alibi_slopes: Tensor | None
) -> Tensor:
    """What plain PyTorch gives in the inputs' dtype, with all scores and a mask: products and weights are rounded."""
    repeat, wide = q.shape[1] // k.shape[1], torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
    scores = (q @ k.mT).to(wide) * (q.shape[3] ** -0.5 if scale is None else scale)
    if alibi_slopes is not None:
        distance = own_key[:, :, None] - torch.arange(k.shape[2], device=q.device)
        scores = scores - alibi_slopes.to(wide)[:, None, None] * distance[:, None]
    some = seen.any(-1, keepdim=True)[:, None]
    return (scores.masked_fill(~seen[:, None] & some, -torch.inf).softmax(-1) * some).to(v.dtype) @ v


def results(function: Any, inputs: tuple[Tensor, ...], dtype: torch.dtype, *more: Any, **options: Any) -> list[Tensor]:
    """Output, dq, dk and dv, on the same (rounded) values in `dtype`. inputs: q, k, v, cotangent."""
    *leaves, grad = (x.detach().to(dtype) for x in inputs)
    leaves = [x.requires_grad_() for x in leaves]
    out = function(*leaves, *more, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def check(shape: Shape, dtype: torch.dtype) -> None:
    """The output within 2x, gradients within 3x of what plain PyTorch loses in that dtype, and for dq and dk a float32
    rounding of each term of both sums in p (dP - delta), whose difference may cancel, for one key wholly. In float32
    also two roundings of every result, and what CUDA's powers lose of each term of dv."""
    inputs, chosen, (first, own) = tensors(shape, dtype), shape.chosen(), shape.rows()
    assert chosen is not None
    more = (own, seen_of(shape, chosen))
    truth, theirs = (results(plain, inputs, one, *more, **shape.options) for one in (torch.float64, dtype))
    ours = results(chosen_attention, inputs, dtype, first, own, chosen, **shape.options)
    q, k, v, grad = (x.double() for x in inputs)
    terms = (shape.scale or q.shape[3] ** -0.5) * grad.norm() * v.square().mean().sqrt()
    cancelled = (0.0, float(terms * k.norm(dim=-1).mean()), float(terms * q.norm(dim=-1).mean()), 0.0)
    for name, mine, other, true, extra in zip(OF_ATTENTION, ours, theirs, truth, cancelled, strict=False):
        assert mine.dtype == dtype
        allowed = (2 if name == "out" else 3) * float((other.double() - true).norm()) + 2 * EPS * extra
        if dtype == torch.float32:
            allowed += 2 * EPS * float(true.norm())
            if name == "dv":
                absolute = results(plain, (*inputs[:3], inputs[3].abs()), torch.float64, *more, **shape.options)[3]
                allowed += weight_rounding(shape.n_keys) * float(absolute.norm())
        error = float((mine.double() - true).norm())
        assert error <= allowed, f"{name}: {error:.3e} > {allowed:.3e}, norm {float(true.norm()):.3e}"


@pytest.mark.parametrize("dtype", DTYPES if CUDA else [torch.float32], ids=str)
@pytest.mark.parametrize("shape", CHOSEN.values(), ids=CHOSEN)
def test_loses_what_plain_pytorch_loses(shape: Shape, dtype: torch.dtype) -> None:
    check(shape, dtype)


@pytest.mark.skipif(CUDA, reason="a case of the test above")
def test_half_precision_loses_what_plain_pytorch_loses() -> None:
    check(SHAPE, torch.bfloat16)


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LARGE_SHAPES)
def test_at_length(name: str, dtype: torch.dtype) -> None:
    shape = LARGE_SHAPES[name]
    if shape.head_dim > 128 and dtype == torch.float32:
        pytest.skip("not a case of the kernel")
    check(replace(shape, density=shape.density or 0.1), dtype)


def test_rows_that_see_nothing_are_zero() -> None:
    shape = Shape(70, 70)
    inputs, chosen = tensors(shape, torch.float32), torch.full((1, 70, 9), 255, dtype=torch.uint8, device=DEVICE)
    chosen[:, 5], chosen[:, 6:40, 0] = 0, 0
    out, dq, dk, dv = results(chosen_attention, inputs, torch.float32, *shape.rows(), chosen)
    for x in (out, dq):
        rows = x[0].any(-1).any(0)
        assert not bool(rows[5:8].any()) and bool(rows[9:].all())  # a row that sees one key has no dq
    more = (shape.rows()[1], seen_of(shape, chosen))
    for ours, other in zip((out, dq, dk, dv), results(plain, inputs, torch.float64, *more, None, None), strict=True):
        torch.testing.assert_close(ours.double(), other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [1, 2], ids=["k", "v"])
def test_what_is_not_finite_reaches_only_rows_that_see_it(which: int, value: float) -> None:
    """Not those of other documents, before it, or that have not chosen it; and of keys those that such a row sees."""
    inputs, more, seen = tensors(SHAPE, torch.float32), (*SHAPE.rows(), SHAPE.chosen()), seen_of(SHAPE, SHAPE.chosen())
    bad = [x.clone() for x in inputs]
    keys = torch.tensor([12, 69, 75, 131], device=DEVICE)
    bad[which][:, 0, keys, 5] = value
    rows = seen[0][:, keys].any(-1)  # of the two query heads of a key head
    others = ~(seen[0] & rows[:, None]).any(0)
    assert 5 < int(rows.sum()) < 100 and int(others.sum()) > 5
    clean, found = (results(chosen_attention, tuple(x), torch.float32, *more, **SHAPE.options) for x in (inputs, bad))
    for i, kept in enumerate((~rows, ~rows, others, others)):
        heads = inputs[0].shape[1] // 2 if i < 2 else 1
        torch.testing.assert_close(found[i][:, :heads, kept], clean[i][:, :heads, kept])
        torch.testing.assert_close(found[i][:, heads:], clean[i][:, heads:])
    assert bool(found[0][:, :2, rows].isnan().all()) and bool(found[1][:, :2, rows].isnan().all())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rows_whose_scores_overflow_are_as_in_softmax(sign: float) -> None:
    """NaN where any is infinity or all are -infinity, which is no row without keys; a weight is 0 where one of several
    is -infinity."""
    shape = Shape(70, 70, heads=2, kv_heads=1)
    q, k, v, grad = tensors(shape, torch.float32)
    chosen = torch.full((1, 70, 9), 255, dtype=torch.uint8, device=DEVICE)
    chosen[:, 30] = 0
    q[:, 0], k[:, :, :, 0] = 0, 0
    q[:, :, :, 0], k[:, :, :20, 0] = 0, 2e19
    q[:, 0, :, 0] = sign * 2e19  # a product is 4e38: all that 20 queries see, some of the others; none of head 1
    found = results(chosen_attention, (q, k, v, grad), torch.float32, *shape.rows(), chosen)
    expected = results(
        plain, (q, k, v, grad), torch.float32, shape.rows()[1], seen_of(shape, chosen), shape.scale, None
    )  # fmt: skip
    assert torch.equal(found[0].isnan().all(-1), found[0].isnan().any(-1))
    rows = torch.zeros(2, 70, dtype=torch.bool, device=DEVICE)
    rows[0, : 20 if sign < 0 else 70] = True
    rows[:, 30] = False
    assert torch.equal(found[0][0].isnan().any(-1), rows) and not bool(found[0][:, :, 30].any())
    rows[:, 30] = True
    torch.testing.assert_close(found[0][0][~rows], expected[0][0][~rows])


def test_any_strides_give_the_same_bits() -> None:
    inputs, given = tensors(SHAPE, torch.float32), (*SHAPE.rows(), SHAPE.chosen())
    expected = results(chosen_attention, inputs, torch.float32, *given, **SHAPE.options)
    columns = tuple(x.mT.contiguous().mT for x in inputs)
    heads_last = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs)
    for views in (inputs, columns, heads_last):
        for ours, first in zip(
            results(chosen_attention, views, torch.float32, *given, **SHAPE.options), expected, strict=True
        ):
            assert torch.equal(ours, first)


def test_registered_operator_is_sound() -> None:
    shape = Shape(9, 9, density=0.5)
    q, k, v, _ = (x.requires_grad_() for x in tensors(shape, torch.float32))
    torch.library.opcheck(attention_operator, (q, k, v, *shape.rows(), shape.chosen(), None, 0.25))


def test_same_bits_where_it_is_recomputed() -> None:
    inputs, given = tensors(SHAPE, torch.float32), (*SHAPE.rows(), SHAPE.chosen())

    def again(*x: Any, **options: Any) -> Tensor:
        return checkpoint(chosen_attention, *x, use_reentrant=False, **options)

    found = [results(f, inputs, torch.float32, *given, **SHAPE.options) for f in (again, chosen_attention)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("n_queries", "n_keys"), [(0, 5), (5, 0)])
def test_nothing_to_attend_to(n_queries: int, n_keys: int) -> None:
    shape = Shape(n_queries, n_keys)
    rows = torch.zeros(2, 1, n_queries, dtype=torch.int64, device=DEVICE)
    rows[1] = min(0, n_keys - 1)  # the last key that is seen: none without keys
    chosen = torch.zeros(1, n_queries, 1, dtype=torch.uint8, device=DEVICE)
    found = results(chosen_attention, tensors(shape, torch.float32), torch.float32, *rows, chosen)
    assert not any(bool(x.any()) for x in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(chosen=torch.zeros(1, 5, 1).byte()), r"chosen must be \(1, 6, at least 1\).*got \(1, 5, 1\)"),
        (dict(own_key=torch.zeros(6).int()), r"own_key must be \(1, 6\), got \(6,\)"),
        (dict(own_key=torch.arange(6)[None] + 1), "own_key must lie below the number of keys, 6, got 6"),
        (dict(first_key=torch.full((1, 6), -1)), "first_key must be at least 0, got -1"),
        (dict(scale=-1.0), "scale must be positive"),
    ],
)
def test_errors_name_the_value(changes: dict[str, Any], message: str) -> None:
    shape = Shape(6, 6, density=0.5)
    names = ("q", "k", "v", "first_key", "own_key", "chosen")
    usual = (*tensors(shape, torch.float32)[:3], *shape.rows(), shape.chosen())
    given = dict(zip(names, usual, strict=True)) | changes
    with pytest.raises(ValueError, match=message):
        chosen_attention(**{name: x.cpu() if isinstance(x, Tensor) else x for name, x in given.items()})
