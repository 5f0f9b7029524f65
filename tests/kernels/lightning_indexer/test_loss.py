"""The indexer's loss by kernels against its definition: errors, gradients, what is read, odd inputs.

The Triton kernels run on CUDA where there is one, else in Triton's interpreter (TRITON_INTERPRET=1, at small sizes).
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.lightning_indexer import tuning
from kernels.lightning_indexer.indexer import indexer_loss
from kernels.lightning_indexer.operator import loss_operator
from kernels.lightning_indexer.tuning import IndexerLaunch
from tests.kernels.helpers import CUDA, DEVICE, needs_cuda, needs_triton
from tests.kernels.lightning_indexer.inputs import LARGE_SHAPES, SHAPES, Shape, check_loss, results
from tests.kernels.operators import (
    WRAPPERS,
    check_cuda_graph,
    check_same_bits,
    check_second_derivatives_are_refused,
    check_transforms_are_refused,
)

pytestmark = needs_triton
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPE = SHAPES["chosen of documents"]


def run(shape: Shape, inputs: tuple[Tensor, ...], dtype: torch.dtype = torch.float32, **changes: Any) -> list[Tensor]:
    given = dict(chosen=shape.chosen(), **shape.options) | changes
    return results(indexer_loss, inputs, dtype, *shape.rows(), **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_loses_what_plain_pytorch_loses(shape: Shape, dtype: torch.dtype) -> None:
    check_loss(indexer_loss, shape, dtype)


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE_SHAPES.values(), ids=LARGE_SHAPES)
def test_at_length(shape: Shape, dtype: torch.dtype) -> None:
    if shape.head_dim > 128 and dtype == torch.float32:
        pytest.skip("not a case of the kernel")
    check_loss(indexer_loss, shape, dtype)


@pytest.mark.skipif(CUDA, reason="tiles on CUDA are those of tuning.py")
@pytest.mark.parametrize(("rows", "keys"), [(16, 16), (64, 32)])
def test_any_tiles(rows: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "INTERPRETED", IndexerLaunch(rows, keys, 4, 1))
    tuning.indexer_launch.cache_clear()
    for name in ("chosen of documents", "chunk"):
        check_loss(indexer_loss, SHAPES[name], torch.float32)
    tuning.indexer_launch.cache_clear()


def test_only_seen_keys_count() -> None:
    """Those of other documents and those that are not chosen change nothing, and have no gradient."""
    shape = Shape(64, 64, documents=(20, 44))
    inputs = shape.tensors(torch.float32)
    chosen = torch.zeros(1, 64, 8, dtype=torch.uint8)
    chosen[:, :20, 0], chosen[:, 20:, 3] = 1, 255  # keys 0, and 24 to 31
    chosen[:, 20:24, 2] = 240  # keys 20 to 23
    chosen = chosen.to(DEVICE)
    expected = run(shape, inputs, chosen=chosen)
    for x in (inputs[1], inputs[4][0]):
        x[:, 1:20] = x[:, 32:] = 30.0
    for ours, other in zip(run(shape, inputs, chosen=chosen), expected, strict=True):
        assert torch.equal(ours, other)
    assert not bool(expected[2][:, 1:20].any()) and not bool(expected[2][:, 32:].any())
    assert bool(expected[2][:, 24:32].any(-1).all())


def test_an_equal_softmax_has_no_loss() -> None:
    """Positive products in one head, of the scale of attention's."""
    index_q, index_k, *_ = Shape(70, 70, index_heads=1, index_dim=16).tensors(torch.float32)
    index_q, index_k, weights = index_q.abs(), index_k.abs(), torch.full((1, 1, 70), 0.25, device=DEVICE)
    own = torch.arange(70, device=DEVICE)[None]
    alike = index_q.expand(-1, 4, -1, -1), index_k[:, None], torch.zeros_like(own), own
    # 2,485 terms p log(p / q), with p of a row 1 in sum, and logarithms that are float32 roundings of scores up to 20
    assert abs(float(indexer_loss(index_q, index_k, weights, *alike))) < 70 * 20 * 2**-23
    assert float(indexer_loss(index_q, index_k, -weights, *alike)) > 1


@pytest.mark.parametrize("which", ["index_q", "index_k", "weights", "q", "k"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_seen(value: float, which: str) -> None:
    """A loss that leaves NaN out would look like a good one."""
    inputs = [x.clone() for x in Shape(70, 70).tensors(torch.float32)]
    place = ("index_q", "index_k", "weights", "q", "k").index(which)
    inputs[place][..., 3] = value
    first, own = Shape(70, 70).rows()
    assert not bool(indexer_loss(*inputs, first, own).isfinite())


def test_any_strides_give_the_same_bits() -> None:
    inputs = SHAPE.tensors(torch.float32)
    expected = run(SHAPE, inputs)
    views = tuple(torch.stack([x, x + 1], -2).flatten(-3, -2)[..., ::2, :] for x in inputs[:2] + inputs[3:])
    columns = tuple(x.mT.contiguous().mT for x in inputs)
    for tensors in (inputs, (*views[:2], columns[2], *views[2:]), columns):
        for ours, first in zip(run(SHAPE, tensors), expected, strict=True):
            assert torch.equal(ours, first)


def test_operands_may_differ_in_dtype() -> None:
    """Under autocast rotated queries of the indexer are float32, its key and attention's inputs bfloat16."""
    inputs = SHAPE.tensors(torch.bfloat16)
    rows, options = SHAPE.rows(), dict(chosen=SHAPE.chosen(), **SHAPE.options)
    mixed = [inputs[0].float(), inputs[1], inputs[2].half()]
    leaves = [x.requires_grad_() for x in mixed]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = indexer_loss(*leaves, *inputs[3:], *rows, **options)
    found = torch.autograd.grad(loss, leaves)
    assert [x.dtype for x in found] == [torch.float32, torch.bfloat16, torch.float16]
    wide = results(indexer_loss, inputs, torch.float32, *rows, **options)
    torch.testing.assert_close(loss.detach(), wide[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n_queries", "n_keys"), [(0, 5), (5, 0)])
def test_nothing_to_see(n_queries: int, n_keys: int) -> None:
    shape = Shape(n_queries, n_keys)
    rows = torch.zeros(2, 1, n_queries, dtype=torch.int64, device=DEVICE)
    rows[1] = min(0, n_keys - 1)  # the last key that is seen: none without keys
    loss, *gradients = results(indexer_loss, shape.tensors(torch.float32), torch.float32, *rows)
    assert float(loss) == 0 and not any(bool(x.any()) for x in gradients)


@settings(max_examples=12)
@given(
    n_keys=st.integers(1, 100), n_queries=st.integers(1, 80), index_heads=st.integers(1, 5), repeat=st.integers(1, 3),
    index_dim=st.integers(1, 40), density=st.sampled_from([None, 0.05, 0.5]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_sizes(
    n_keys: int, n_queries: int, index_heads: int, repeat: int, index_dim: int, density: float | None, seed: int
) -> None:
    documents = (n_keys // 3, n_keys - n_keys // 3)
    shape = Shape(
        min(n_queries, n_keys), n_keys, index_heads, index_dim, repeat, 1, density=density, documents=documents
    )
    check_loss(indexer_loss, shape, torch.float32, seed)


def test_registered_operator_is_sound() -> None:
    shape = Shape(9, 9, density=0.5)
    index, attention = ([*part] for part in (shape.tensors(torch.float32)[:3], shape.tensors(torch.float32)[3:]))
    given = *(x.requires_grad_() for x in index), *attention, *shape.rows(), shape.chosen(), None, 0.25
    torch.library.opcheck(loss_operator, given)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_same_bits_where_it_is(wrap: Any) -> None:
    inputs, given = SHAPE.tensors(torch.float32), dict(chosen=SHAPE.chosen(), **SHAPE.options)
    check_same_bits(wrap, indexer_loss, lambda f: results(f, inputs, torch.float32, *SHAPE.rows(), **given))


def test_second_derivatives_are_refused() -> None:
    index_q, *others = Shape(5, 5).tensors(torch.float32)
    rows = Shape(5, 5).rows()
    check_second_derivatives_are_refused(lambda x: indexer_loss(x, *others, *rows) ** 2, index_q)


@needs_cuda
def test_cuda_graph_equals_eager() -> None:
    """Nobody asks the device."""
    shape = LARGE_SHAPES["30m, chosen"]
    inputs, (first, own), chosen = shape.tensors(torch.bfloat16), shape.rows(), shape.chosen()
    leaves, options = [x.requires_grad_() for x in inputs[:3]], shape.options

    def step() -> list[Tensor]:
        loss = indexer_loss(*leaves, *inputs[3:], first, own, chosen=chosen, **options)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    def redraw(seed: int) -> None:
        for x, new in zip(inputs, shape.tensors(torch.bfloat16, seed), strict=True):
            x.copy_(new)

    check_cuda_graph(step, redraw)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(index_q=torch.zeros(1, 2, 6)), r"index_q must be \(batch, heads, queries, channels\), got \(1, 2, 6\)"),
        (dict(index_k=torch.zeros(1, 6, 5)), r"index_k must be \(1, keys, 12\) beside index_q, got \(1, 6, 5\)"),
        (dict(weights=torch.zeros(1, 2, 6)), r"weights must be \(1, 3, 6\) beside index_q, got \(1, 2, 6\)"),
        (dict(weights=torch.zeros(1, 3, 6).int()), "weights must be floating point on .*, got torch.int32"),
        (dict(k=torch.zeros(1, 2, 7, 20)), r"k must be \(1, heads, 6, D\) beside the index, got \(1, 2, 7, 20\)"),
        (dict(k=torch.zeros(1, 3, 6, 20)), "query heads must be a multiple of key heads, got 4 and 3"),
        (dict(first_key=torch.zeros(1, 6)), "first_key must be torch.int32 or torch.int64 on .*, got torch.float32"),
        (dict(own_key=torch.zeros(6).int()), r"own_key must be \(1, 6\), got \(6,\)"),
        (dict(own_key=torch.arange(6)[None] + 1), "own_key must lie below the number of keys, 6, got 6"),
        (dict(first_key=torch.full((1, 6), -1)), "first_key must be at least 0, got -1"),
        (
            dict(own_key=torch.tensor([[0, 1, 3, 2, 4, 5]])),
            "own_key must not fall from one query to the next, got 3 and 2 at queries 2 and 3; sort the queries",
        ),
        (dict(chosen=torch.zeros(1, 6, 1)), "chosen must be torch.uint8 on .*, got torch.float32"),
        (dict(chosen=torch.zeros(1, 5, 1).byte()), r"chosen must be \(1, 6, at least 1\).*got \(1, 5, 1\)"),
        (dict(scale=-1.0), "scale must be positive"),
        (dict(index_q=torch.zeros(1, 3, 6, 130), index_k=torch.zeros(1, 6, 130)), "up to 128 channels a head.*130"),
        (dict(q=torch.zeros(1, 4, 6, 20).double(), k=torch.zeros(1, 2, 6, 20).double()), "float64"),
    ],
)
def test_errors_name_the_value(changes: dict[str, Any], message: str) -> None:
    names = ("index_q", "index_k", "weights", "q", "k", "first_key", "own_key")
    given = dict(zip(names, (*Shape(6, 6).tensors(torch.float32), *Shape(6, 6).rows()), strict=True)) | changes
    with pytest.raises(ValueError, match=message):
        indexer_loss(**{name: x.cpu() if isinstance(x, Tensor) else x for name, x in given.items()})


def test_transforms_are_refused() -> None:
    index_q, *others = Shape(5, 5).tensors(torch.float32)
    rows, way_out = Shape(5, 5).rows(), "use model.dsa.loss with backend='torch'"
    check_transforms_are_refused(lambda x: indexer_loss(x, *others, *rows), index_q, way_out)
