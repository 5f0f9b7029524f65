"""Importance of blocks against loops over tokens: errors, documents, marks, odd inputs; as an operator.

The Triton kernels run on CUDA where there is one, else in Triton's interpreter (TRITON_INTERPRET=1, at small sizes).
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import block_importance_scores
from kernels.block_importance.operator import importance_operator
from tests.kernels.block_importance.inputs import SLOPES, Shape, looped, plain
from tests.kernels.helpers import (
    CUDA,
    DEVICE,
    EPS,
    assert_same,
    check_any_strides,
    needs_cuda,
    needs_triton,
    weight_rounding,
)

BACKENDS = [pytest.param("triton", marks=needs_triton), "torch"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {
    "one document": Shape((101,), batch=2),
    "grouped by three": Shape((70,), heads=3, kv_heads=1),
    "one head a group": Shape((70,), heads=2),
    "head dim of no power of two": Shape((70,), head_dim=24),
    "wide heads": Shape((70,), heads=2, head_dim=80),
    "the paper's sizes": Shape((300,), n_queries=90, length=32, stride=16, block_size=64),
    "documents": Shape((5, 70, 1, 8, 7, 45)),
    "documents, some too short for a key": Shape((3, 33, 7, 2, 40)),
    "alibi": Shape((90,), slopes=SLOPES),
    "alibi documents": Shape((33, 57), slopes=SLOPES, scale=1.3),
    "chunk": Shape((131,), n_queries=40),
    "decode": Shape((90,), n_queries=1, batch=3, ragged=True),
    "rows of several lengths": Shape((120,), n_queries=70, batch=2, ragged=True, slopes=SLOPES),
    "queries that see nothing": Shape((30,), n_queries=6, length=28, batch=3, ragged=True),
    "no query sees a key": Shape((7, 5)),
    "blocks, lengths and strides of one size": Shape((60,), length=4, stride=4, block_size=4),
    "keys longer than blocks": Shape((60, 20), length=24, stride=4, block_size=8),
    "no power of two": Shape((50, 40), length=9, stride=3, block_size=15),
    "a token": Shape((40,), length=1, stride=1, block_size=1),
    "one block": Shape((70,), block_size=100),
}
LARGE_SHAPES = {
    "64": Shape((2111,), length=32, stride=16, block_size=64, head_dim=64),
    "64 documents": Shape((1000, 3, 1108), length=32, stride=16, block_size=64, head_dim=64, slopes=SLOPES),
    "96": Shape((1500,), length=32, stride=16, block_size=32, head_dim=96),
    "128": Shape((5111,), n_queries=2000, length=32, stride=16, block_size=64, heads=8, head_dim=128),
    "256": Shape((1311,), length=16, stride=8, block_size=128, heads=2, head_dim=256),
    "decode": Shape((20000,), n_queries=1, length=32, stride=16, block_size=64, head_dim=128, batch=3, ragged=True),
}


def rated(shape: Shape, dtype: torch.dtype, backend: str, seed: int = 0) -> Tensor:
    q, k = shape.tensors(dtype, seed)
    return block_importance_scores(q, k, *shape.places(), backend=backend, **shape.options)


def check(shape: Shape, dtype: torch.dtype, ours: Tensor, truth: Tensor) -> None:
    """Within 2x of what plain PyTorch loses, two roundings of every result, what a rounding of each score does, and
    what CUDA's powers lose."""
    q, k = shape.tensors(dtype)
    theirs, doubt = plain(q, k, *shape.places(), **shape.options)
    assert ours.dtype == theirs.dtype and ours.shape == truth.shape == theirs.shape
    rounding = 2 * EPS + weight_rounding(max(k.shape[2], 1))
    allowed = 2 * (theirs.double() - truth).norm() + rounding * truth.norm() + doubt.norm()
    error = (ours.double() - truth).norm()
    assert error <= allowed, f"{error:.3e} > {allowed:.3e}, norm {truth.norm():.3e}"
    assert not bool(ours[truth == 0].any())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES if CUDA else DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_loses_what_plain_pytorch_loses(shape: Shape, dtype: torch.dtype, backend: str) -> None:
    truth = looped(*shape.tensors(dtype), *shape.places(), **shape.options)
    check(shape, dtype, rated(shape, dtype, backend), truth)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_float64_equals_loops(shape: Shape) -> None:
    """To sums of some dozens of terms."""
    truth = looped(*shape.tensors(torch.float64), *shape.places(), **shape.options)
    torch.testing.assert_close(rated(shape, torch.float64, "torch"), truth, atol=1e-13, rtol=1e-13)
    auto = rated(shape, torch.float64, "auto")
    assert auto.dtype == torch.float64 and torch.equal(auto, rated(shape, torch.float64, "torch"))


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE_SHAPES.values(), ids=LARGE_SHAPES)
def test_at_length(shape: Shape, dtype: torch.dtype) -> None:
    """Against the reference in float64, which the other tests hold to the loops."""
    if shape.head_dim > 128 and dtype == torch.float32:
        pytest.skip("not a case of the kernel")
    q, k = (x.double() for x in shape.tensors(dtype))
    truth = block_importance_scores(q, k, *shape.places(), backend="torch", **shape.options)
    check(shape, dtype, rated(shape, dtype, "triton"), truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("local", [1, 2, 50])
@pytest.mark.parametrize("name", ["documents", "rows of several lengths", "the paper's sizes", "no query sees a key"])
def test_marks_what_is_always_chosen(name: str, local: int, backend: str) -> None:
    """Other blocks have the bits that they have without marks."""
    shape = SHAPES[name]
    marked = rated(replace(shape, select_local=local), torch.float32, backend)
    loops = looped(*shape.tensors(torch.float32), *shape.places(), **shape.options | dict(select_local=local))
    assert torch.equal(marked == torch.inf, loops == torch.inf) and bool((marked == torch.inf).any())
    assert torch.equal(marked == -torch.inf, loops == -torch.inf)
    finite = loops.isfinite()
    assert torch.equal(marked[finite], rated(shape, torch.float32, backend)[finite])


@pytest.mark.parametrize("backend", BACKENDS)
def test_overlaps_of_the_paper(backend: str) -> None:
    """Block j of 64 tokens shares 1 2 2 2 1 strides with compressed keys 4 j - 1 ... 4 j + 3. Each query has all its
    weight at one key, whose score of 320 is rounded by half its EPS, and so is the log-sum-exp."""
    q = 2000 * torch.eye(39, device=DEVICE)[None, None]
    k = torch.eye(39, device=DEVICE)[None, None]
    places = torch.zeros(1, 39, dtype=torch.int64, device=DEVICE), torch.full((1, 39), 639, device=DEVICE)
    sizes = dict(compress_length=32, compress_stride=16, block_size=64, n_blocks=10)
    shares = block_importance_scores(q, k, *places, **sizes, backend=backend)[0, 0].T.cpu()  # [blocks, keys]
    expected = torch.zeros(10, 39)
    expected[0, :4] = torch.tensor([2.0, 2, 2, 1])
    for j in range(1, 9):
        expected[j, 4 * j - 1 : 4 * j + 4] = torch.tensor([1.0, 2, 2, 2, 1])
    expected[9, 35:] = torch.tensor([1.0, 2, 2, 2])
    assert torch.equal(shares > 0, expected > 0)
    torch.testing.assert_close(shares, expected, atol=0, rtol=(321 + 12) * EPS + weight_rounding(39))


@pytest.mark.parametrize("backend", BACKENDS)
def test_alike_scores_weigh_alike(backend: str) -> None:
    """Scores of 3600 are rounded by half their EPS, and so is their log-sum-exp; beside these a sum of ten weights.
    Blocks in the midst of what a query sees have the same bits."""
    shape = SHAPES["documents"]
    q, k = (torch.ones_like(x) * 30 for x in shape.tensors(torch.float32))
    ours = block_importance_scores(q, k, *shape.places(), backend=backend, **shape.options)
    truth = looped(q, k, *shape.places(), **shape.options)
    torch.testing.assert_close(ours.double(), truth, atol=0, rtol=(3600 + 12) * EPS + weight_rounding(70))
    assert torch.equal(ours[:, :, 5 + 55 : 75, 1], ours[:, :, 5 + 55 : 75, 2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_documents_change_nothing(backend: str) -> None:
    """Not even NaN in their keys, nor what stands behind the last key that is seen."""
    shape = Shape((40, 60, 30), slopes=SLOPES)
    (q, k), places = shape.tensors(torch.float32), shape.places()
    expected = block_importance_scores(q, k, *places, backend=backend, **shape.options)
    first = int(places[0][0, 40]), int(places[0][0, 100])
    k[:, :, : first[0]] = torch.nan
    k[:, :, first[1] - 1 :] = torch.nan  # and the second document's last key
    found = block_importance_scores(q, k, *places, backend=backend, **shape.options)
    assert_same(found[:, :, 40:99], expected[:, :, 40:99], backend)
    assert torch.equal(found[:, :, 99].isnan(), expected[:, :, 99] > 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_a_number_is_seen(value: float, backend: str) -> None:
    """By the queries that see it, in all blocks in which they see keys; what is -inf for all keys too."""
    shape = Shape((40, 30))
    (q, k), (first, position) = shape.tensors(torch.float32), shape.places()
    expected = block_importance_scores(q, k, first, position, backend=backend, **shape.options)
    q[..., 0], start = 1.0, int(first[0, 40])
    if value == -torch.inf:
        k[:, :, start:, 0] = value
        from_query = 40
    else:
        k[:, :, start + 2, 0] = value
        from_query = 40 + 2 * shape.stride + shape.length - 1
    found = block_importance_scores(q, k, first, position, backend=backend, **shape.options)
    rows = torch.arange(70, device=DEVICE) >= from_query
    assert torch.equal(found.isnan(), (expected > 0) & rows[:, None]) and bool(found.isnan().any())


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_and_integers_give_the_same_bits(backend: str) -> None:
    shape = SHAPES["rows of several lengths"]
    first, position = shape.places()

    def run(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return (block_importance_scores(q, k, first, position, backend=backend, **shape.options),)

    q, k = shape.tensors(torch.float32)
    if backend == "triton":
        check_any_strides(run, (q, k))
    wide = torch.stack([position, position + 1], -1)[..., 0]
    for places in ((first.int(), position.int()), (first.int(), wide), (first[:1], position)):
        assert_same(block_importance_scores(q, k, *places, backend=backend, **shape.options), run(q, k)[0], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradient_and_outside_autocast(backend: str) -> None:
    shape = SHAPES["alibi documents"]
    q, k = (x.requires_grad_() for x in shape.tensors(torch.float32))
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = block_importance_scores(q, k, *shape.places(), backend=backend, **shape.options)
    assert not ours.requires_grad and torch.equal(ours, rated(shape, torch.float32, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_rate(backend: str) -> None:
    shape = SHAPES["one document"]
    (q, k), (first, position) = shape.tensors(torch.float32), shape.places()
    none = block_importance_scores(q[:, :, :0], k, first[:, :0], position[:, :0], backend=backend, **shape.options)
    assert none.shape == (2, 2, 0, 7)
    sees_none = block_importance_scores(q, k[:, :, :0], first, position * 0, backend=backend, **shape.options)
    assert sees_none.shape == (2, 2, 101, 7) and not sees_none.any()
    no_blocks = block_importance_scores(q, k, first, position, backend=backend, **shape.options | dict(n_blocks=0))
    assert no_blocks.shape == (2, 2, 101, 0)


@pytest.mark.parametrize("backend", BACKENDS[:1])
@settings(max_examples=12)
@given(
    n=st.integers(1, 100), n_queries=st.integers(1, 60), stride=st.integers(1, 5), parts=st.integers(1, 4),
    size=st.integers(1, 6), repeat=st.integers(1, 3), cut=st.floats(0, 1), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_sizes(
    n: int, n_queries: int, stride: int, parts: int, size: int, repeat: int, cut: float, seed: int, backend: str
) -> None:
    shape = Shape(
        (int(cut * n), n - int(cut * n)), min(n, n_queries), parts * stride, stride, size * stride, repeat, kv_heads=1,
    )  # fmt: skip
    ours, theirs = (rated(shape, torch.float32, b, seed) for b in (backend, "torch"))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(first_key=torch.zeros(6)), "first_key must be torch.int32 or torch.int64 on cpu, got torch.float32"),
        (dict(position=torch.zeros(6).int()), r"position must be \(1, 6\), got \(6,\)"),
        (dict(first_key=torch.full((1, 6), -3)), "first_key must be at least 0, got -3"),
        (dict(position=torch.full((1, 6), 9)), "below the number of keys, 3, got key 4"),
        (dict(compress_stride=0), "compress_stride must lie in 1 ... 1048576, got 0"),
        (dict(compress_length=3), "compress_length must be a multiple of compress_stride, 2, got 3"),
        (dict(block_size=5), "block_size must be a multiple of compress_stride, 2, got 5"),
        (dict(n_blocks=-1), "n_blocks must be at least 0, got -1"),
        (dict(select_local=0), "select_local must be at least 1, got 0"),
        (dict(scale=-1.0), "scale must be positive"),
        (dict(backend="flex"), "backend must be one of auto, triton, torch, got 'flex'"),
    ],
)
def test_errors_name_the_value(changes: dict[str, Any], message: str) -> None:
    q, k = (x.cpu() for x in Shape((6,), stride=2, length=2).tensors(torch.float32))
    usual = dict(
        first_key=torch.zeros(1, 6, dtype=torch.int64), position=torch.arange(6)[None], compress_length=2,
        compress_stride=2, block_size=4, n_blocks=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        block_importance_scores(q, k, **usual | changes)


class TestOperator:
    pytestmark = needs_triton
    shape = SHAPES["alibi documents"]

    @pytest.mark.parametrize("local", [None, 2])
    def test_is_sound(self, local: int | None) -> None:
        slopes = torch.tensor(SLOPES, device=DEVICE)
        inputs = (*self.shape.tensors(torch.float32), *self.shape.places(), slopes, 8, 4, 16, 4, local, 0.25)
        torch.library.opcheck(importance_operator, inputs, test_utils=("test_schema", "test_faketensor"))

    def test_same_bits_where_it_is_compiled(self) -> None:
        torch._dynamo.reset()

        def run(*inputs: Tensor) -> Tensor:
            return block_importance_scores(*inputs, backend="triton", **self.shape.options)

        inputs = *self.shape.tensors(torch.float32), *self.shape.places()
        assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs), run(*inputs))
