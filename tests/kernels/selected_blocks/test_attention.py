"""Attention over selected blocks against its definition: errors, gradients, what is read, odd inputs.

The Triton kernels run on CUDA where there is one, else in Triton's interpreter (TRITON_INTERPRET=1, at small sizes).
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import selected_block_attention
from kernels.selected_blocks import launches, readers, reference, tuning
from kernels.selected_blocks.readers import list_readers
from tests.kernels.helpers import CUDA, DEVICE, check_any_strides, draw, needs_cuda, needs_triton
from tests.kernels.selected_blocks.inputs import LARGE_SHAPES, SHAPES, Shape, check, results

BACKENDS = [pytest.param("triton", marks=needs_triton), "torch"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["a query at a time", "a block at a time"])
def design(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the Triton kernels forward."""
    monkeypatch.setattr(tuning, "FEW_QUERIES", 10**9 if "query" in request.param else 0)


@pytest.mark.usefixtures("design")
@pytest.mark.parametrize("backend", BACKENDS[:1])
@pytest.mark.parametrize("dtype", DTYPES if CUDA else [torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_output_loses_what_plain_pytorch_loses(shape: Shape, dtype: torch.dtype, backend: str) -> None:
    check(shape, dtype, backend, gradients=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_lose_what_those_of_plain_pytorch_lose(shape: Shape, dtype: torch.dtype, backend: str) -> None:
    check(shape, dtype, backend)


@needs_cuda
@pytest.mark.usefixtures("design")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE_SHAPES.values(), ids=LARGE_SHAPES)
def test_at_length(shape: Shape, dtype: torch.dtype) -> None:
    if shape.head_dim > 128 and dtype == torch.float32:
        pytest.skip("not a case of the kernel")
    check(shape, dtype, "triton")


@pytest.mark.parametrize("name", ["causal", "documents", "blocks of several tiles"])
@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_many_readers_and_many_queries_are_several_parts(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a block, as a document's first one has; and where the memory of parts is bounded."""
    monkeypatch.setattr(tuning, "FEW_QUERIES", 0)
    monkeypatch.setattr(readers, "READERS", 7)
    check(SHAPES[name], torch.float32, backend)
    monkeypatch.setattr(launches, "PART_ELEMENTS", 40_000)  # 26 queries of "causal" at once
    check(SHAPES[name], torch.float32, backend)


def test_reference_takes_queries_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "GATHERED_ELEMENTS", 40_000)
    for name in ("causal", "documents", "alibi"):
        check(SHAPES[name], torch.float32, "torch")


@pytest.mark.parametrize("name", ["alibi documents", "grouped by three", "odd blocks"])
def test_definition_written_out(name: str) -> None:
    """The reference against loops that share nothing with it."""
    shape = SHAPES[name]
    (q, k, v, _), (first, own) = shape.tensors(torch.float64), shape.selection()
    out = selected_block_attention(q, k, v, first, own, backend="torch", **shape.options)
    scale = shape.scale or q.shape[3] ** -0.5
    for h in range(shape.heads):
        g = h * shape.kv_heads // shape.heads
        slope = 0.0 if shape.slopes is None else float(shape.options["alibi_slopes"][h])  # in float32
        for i in range(shape.n_queries):
            at = int(own[0, i])
            keys = [
                j
                for start in first[0, g, i].tolist()
                for j in range(start, min(start + shape.block_size, shape.n_keys))
                if start >= 0 and j <= at
            ]
            if not keys:
                assert not bool(out[0, h, i].any())
                continue
            scores = torch.stack([q[0, h, i] @ k[0, g, j] * scale - slope * (at - j) for j in keys])
            torch.testing.assert_close(out[0, h, i], scores.softmax(0) @ v[0, g, keys], atol=1e-12, rtol=1e-12)


def test_gradients_are_those_of_differences() -> None:
    shape = Shape(9, 12, block_size=4, count=2, heads=2, kv_heads=1, head_dim=3)
    tensors, selection = shape.tensors(torch.float64)[:3], shape.selection()

    def attend(*x: Tensor) -> Tensor:
        return selected_block_attention(*x, *selection, backend="torch", **shape.options)

    assert torch.autograd.gradcheck(attend, [x.requires_grad_() for x in tensors])


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_may_overlap(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of different queries do anywhere; a key in two blocks of one query counts twice."""
    monkeypatch.setattr(tuning, "FEW_QUERIES", 0)
    inputs = Shape(50, 50).tensors(torch.float32)
    own = torch.arange(50, device=DEVICE)[None]
    generator = torch.Generator().manual_seed(0)
    first = (torch.rand(1, 2, 50, 3, generator=generator).to(DEVICE) * (own[..., None] + 1)).int()
    options: dict[str, Any] = dict(block_size=16, n_blocks=50)
    ours = results(selected_block_attention, inputs, torch.float32, first, own, backend=backend, **options)

    def counted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        counts = torch.zeros(2, 50, 50, dtype=torch.float64, device=DEVICE)
        for g in range(2):
            for i in range(50):
                for start in first[0, g, i].tolist():
                    counts[g, i, start : min(start + 16, i + 1)] += 1
        scores = q @ k.repeat_interleave(2, 1).mT / 4 + counts.repeat_interleave(2, 0).log()
        return scores.softmax(-1) @ v.repeat_interleave(2, 1)

    for mine, true in zip(ours, results(counted, inputs, torch.float64), strict=True):
        torch.testing.assert_close(mine.double(), true, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("design")
@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_only_selected_blocks_are_read(backend: str) -> None:
    """NaN keys and values of other blocks stay out of the output and of all gradients."""
    shape = Shape(64, 64, count=2)
    q, k, v, grad = shape.tensors(torch.float32)
    own = torch.arange(64, device=DEVICE)[None]
    first = torch.full((1, 2, 64, 2), -1, dtype=torch.int32, device=DEVICE)
    first[:, :, 32:, 1] = 16
    k[:, :, :16] = k[:, :, 32:] = v[:, :, :16] = v[:, :, 32:] = torch.nan
    out, dq, dk, dv = results(
        selected_block_attention, (q, k, v, grad), torch.float32, first, own, backend=backend, block_size=16
    )
    keys, values = (x[:, :, 16:32].repeat_interleave(2, 1) for x in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q[:, :, 32:], keys, values)
    torch.testing.assert_close(out[:, :, 32:], expected)
    assert not bool(out[:, :, :32].any()) and not bool(dq[:, :, :32].any())
    for x in (dk, dv):
        assert not bool(x[:, :, :16].any()) and not bool(x[:, :, 32:].any()) and bool(x[:, :, 16:32].all())


@pytest.mark.usefixtures("design")
@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_all_blocks_are_dense_attention(backend: str) -> None:
    q, k, v, _ = Shape(80, 80).tensors(torch.float32)
    own = torch.arange(80, device=DEVICE)[None]
    first = (torch.arange(5, device=DEVICE) * 16).int().expand(1, 2, 80, 5)
    out = selected_block_attention(q, k, v, first, own, block_size=16, backend=backend)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, dense)


@pytest.mark.usefixtures("design")
@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_any_strides_give_the_same_bits(backend: str) -> None:
    shape = SHAPES["alibi"]
    inputs, selection = shape.tensors(torch.float32), shape.selection()

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        options = shape.options | dict(backend=backend)
        return results(selected_block_attention, tensors, torch.float32, *selection, **options)

    check_any_strides(run, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n_queries", "n_keys", "count"), [(0, 5, 1), (5, 0, 1), (5, 5, 0)])
def test_nothing_to_attend_to(n_queries: int, n_keys: int, count: int, backend: str) -> None:
    inputs = Shape(n_queries, n_keys).tensors(torch.float32)
    first = torch.full((1, 2, n_queries, count), -1, dtype=torch.int32, device=DEVICE)
    own = torch.zeros(1, n_queries, dtype=torch.int64, device=DEVICE)
    found = results(selected_block_attention, inputs, torch.float32, first, own, block_size=4, backend=backend)
    for ours, x in zip(found, (inputs[0], *inputs[:3]), strict=True):
        assert ours.shape == x.shape and not bool(ours.any())


def test_readers_are_those_of_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "READERS", 5)
    first, _ = SHAPES["causal"].selection()
    found = list_readers(first, 101, 7)
    order, parts = found.order.tolist(), found.parts.tolist()
    flat = first.flatten().tolist()
    expected = {}
    for place, start in enumerate(flat):
        if start >= 0:
            expected.setdefault((place // (101 * 3), start), []).append(place)
    ours: dict[tuple[int, int], list[int]] = {}
    for head, start, begin, end in parts:
        assert end - begin <= 5
        if begin < end:
            ours.setdefault((head, start), []).extend(order[begin:end])
    assert ours == expected and list(ours) == sorted(ours)
    starts = found.starts.tolist()
    for head in range(4):
        for key in (0, 1, 16, 17, 100):
            before = sum(begin < end and (h, start) < (head, key) for h, start, begin, end in parts)
            assert starts[head * 101 + key] == before


def test_more_blocks_than_promised_are_refused() -> None:
    first, _ = SHAPES["causal"].selection()
    with pytest.raises(RuntimeError, match="more distinct blocks are selected than n_blocks = 3"):
        list_readers(first.cpu(), 101, 3)


@pytest.mark.parametrize("backend", BACKENDS[:1])
@settings(max_examples=12)
@given(
    n_keys=st.integers(1, 120), n_queries=st.integers(1, 80), size=st.integers(1, 40), count=st.integers(1, 5),
    repeat=st.integers(1, 5), seed=st.integers(0, 1000), few=st.booleans(),
)  # fmt: skip
def test_any_sizes(
    n_keys: int, n_queries: int, size: int, count: int, repeat: int, seed: int, few: bool, backend: str
) -> None:
    shape = Shape(n_queries, n_keys, count=count, block_size=size, heads=repeat, kv_heads=1)
    inputs, selection = shape.tensors(torch.float32, seed), shape.selection(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "FEW_QUERIES", 10**9 if few else 0)
        ours, theirs = (
            results(selected_block_attention, inputs, torch.float32, *selection, backend=b, **shape.options)
            for b in (backend, "torch")
        )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(first_key=torch.zeros(1, 2, 6, 2)), "first_key must be torch.int32 on cpu, got torch.float32"),
        (dict(first_key=torch.zeros(1, 4, 6, 2).int()), r"first_key must be \(1, 2, 6, count\).*got \(1, 4, 6, 2\)"),
        (dict(first_key=torch.full((1, 2, 6, 2), 6).int()), "first_key must lie in 0 ... 5, or be -1.*got 6"),
        (dict(first_key=torch.full((1, 2, 6, 2), -2).int()), "first_key must lie in 0 ... 5, or be -1.*got -2"),
        (dict(own_key=torch.zeros(6)), "own_key must be torch.int32 or torch.int64 on cpu, got torch.float32"),
        (dict(own_key=torch.zeros(6).int()), r"own_key must be \(1, 6\), got \(6,\)"),
        (dict(block_size=0), "block_size must lie in 1 ... 1048576, got 0"),
        (dict(first_key=torch.arange(6).int().expand(1, 2, 2, 6).mT), "n_blocks must be at least .*, 6, got 3"),
        (dict(scale=-1.0), "scale must be positive"),
        (dict(backend="flex"), "backend must be one of auto, triton, torch, got 'flex'"),
    ],
)
def test_errors_name_the_value(changes: dict[str, Any], message: str) -> None:
    q, k, v, _ = (x.cpu() for x in Shape(6, 6).tensors(torch.float32))
    first, own = torch.zeros(1, 2, 6, 2, dtype=torch.int32), torch.arange(6)[None]
    with pytest.raises(ValueError, match=message):
        selected_block_attention(q, k, v, **dict(first_key=first, own_key=own, block_size=2) | changes)


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_what_the_kernels_do_not_take_is_named(backend: str) -> None:
    own, first = torch.zeros(1, 3, dtype=torch.int64, device=DEVICE), torch.zeros(1, 1, 3, 1).int().to(DEVICE)
    wide = [draw(1, heads, 3, 16) for heads in (200, 1, 1)]
    with pytest.raises(ValueError, match="takes up to 128 query heads for each key head, got 200 and 1"):
        selected_block_attention(*wide, first, own, block_size=4, backend=backend)
    double = [draw(1, 1, 3, 16, dtype=torch.float64) for _ in range(3)]
    with pytest.raises(ValueError, match="float64"):
        selected_block_attention(*double, first, own, block_size=4, backend=backend)
