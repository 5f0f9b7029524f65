"""Attention with a bias for each block against its definition: errors, gradients, what is read, odd inputs.

The Triton kernels run on CUDA where there is one, else in Triton's interpreter (TRITON_INTERPRET=1, at small sizes).
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import block_bias_attention
from kernels.block_bias import reference
from tests.kernels.block_bias.inputs import LARGE_SHAPES, SHAPES, Shape, check, results
from tests.kernels.helpers import CUDA, DEVICE, check_any_strides, draw, needs_cuda, needs_triton

BACKENDS = [pytest.param("triton", marks=needs_triton), "torch"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES if CUDA else DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_loses_what_plain_pytorch_loses(shape: Shape, dtype: torch.dtype, backend: str) -> None:
    check(shape, dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(backend: str) -> None:
    check(SHAPES["alibi documents"], torch.float16, backend)


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE_SHAPES.values(), ids=LARGE_SHAPES)
def test_at_length(shape: Shape, dtype: torch.dtype) -> None:
    if shape.head_dim > 128 and dtype == torch.float32:
        pytest.skip("not a case of the kernel")
    check(shape, dtype, "triton")


def test_reference_takes_queries_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "SCORES", 4 * 150 * 20)
    for name in ("causal", "documents", "alibi"):
        check(SHAPES[name], torch.float32, "torch")


@pytest.mark.parametrize("name", ["alibi documents", "grouped by three", "odd blocks", "documents"])
def test_definition_written_out(name: str) -> None:
    """The reference against loops that share nothing with it."""
    shape = SHAPES[name]
    (q, k, v, bias, _), (first, own) = shape.tensors(torch.float64), shape.positions()
    out = block_bias_attention(q, k, v, bias, first, own, backend="torch", **shape.options)
    scale = shape.scale or q.shape[3] ** -0.5
    for h in range(shape.heads):
        g = h * shape.kv_heads // shape.heads
        slope = 0.0 if shape.slopes is None else float(shape.options["alibi_slopes"][h])  # in float32
        for i in range(shape.n_queries):
            at, start = int(own[0, i]), int(first[0, i])
            biases = {j: float(bias[0, h, i, (j - start) // shape.block_size]) for j in range(start, at + 1)}
            keys = [j for j, b in biases.items() if b > -torch.inf]
            if not keys:
                assert not bool(out[0, h, i].any())
                continue
            scores = torch.stack([q[0, h, i] @ k[0, g, j] * scale + biases[j] - slope * (at - j) for j in keys])
            torch.testing.assert_close(out[0, h, i], scores.softmax(0) @ v[0, g, keys], atol=1e-12, rtol=1e-12)


def test_gradients_are_those_of_differences() -> None:
    shape = Shape(9, 12, block_size=4, heads=2, kv_heads=1, head_dim=3, live=0.7)
    *tensors, _ = shape.tensors(torch.float64)
    positions = shape.positions()
    q, k, v, bias = tensors
    last = (positions[1] - positions[0])[:, None, :, None] // 4
    read = (bias != -torch.inf) & (torch.arange(3, device=DEVICE) <= last)

    def attend(q: Tensor, k: Tensor, v: Tensor, live: Tensor) -> Tensor:
        full = torch.full_like(bias, -torch.inf).masked_scatter(read, live)
        return block_bias_attention(q, k, v, full, *positions, backend="torch", **shape.options)

    assert torch.autograd.gradcheck(attend, [x.requires_grad_() for x in (q, k, v, bias[read])])


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_live_blocks_are_read(backend: str) -> None:
    """NaN keys and values of other blocks, and of other documents, stay out of the output and of all gradients."""
    q, k, v, _, grad = Shape(96, 96).tensors(torch.float32)
    own = torch.arange(96, device=DEVICE)[None]
    first = torch.where(own < 80, 0, 80)
    bias = torch.full((1, 4, 96, 5), -torch.inf, device=DEVICE)
    bias[:, :, 32:, 1] = 0.5
    for x in (k, v):
        x[:, :, :16] = x[:, :, 32:] = torch.nan
    bias[:, :, 80:] = -torch.inf
    out, dq, dk, dv, dbias = results(
        block_bias_attention, (q, k, v, bias, grad), torch.float32, first, own, backend=backend, block_size=16
    )
    keys, values = (x[:, :, 16:32].repeat_interleave(2, 1) for x in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q[:, :, 32:80], keys, values)
    torch.testing.assert_close(out[:, :, 32:80], expected)
    for x in (out, dq, dbias):
        assert not bool(x[:, :, :32].any()) and not bool(x[:, :, 80:].any())
    for x in (dk, dv):
        assert not bool(x[:, :, :16].any()) and not bool(x[:, :, 32:].any()) and bool(x[:, :, 16:32].all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_that_all_blocks_share_is_none(backend: str) -> None:
    q, k, v, _, _ = Shape(80, 80).tensors(torch.float32)
    own = torch.arange(80, device=DEVICE)[None]
    bias = torch.full((1, 4, 80, 5), -3.0, device=DEVICE)
    out = block_bias_attention(q, k, v, bias, torch.zeros_like(own), own, block_size=16, backend=backend)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, dense)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", ["k", "bias"])
def test_not_a_number_is_seen(which: str, backend: str) -> None:
    """By the queries that read it."""
    shape = SHAPES["all blocks"]
    q, k, v, bias, _ = shape.tensors(torch.float32)
    if which == "k":
        k[0, 0, 20] = torch.nan
    else:
        bias[0, :2, 20:, 1] = torch.nan
    out = block_bias_attention(q, k, v, bias, *shape.positions(), backend=backend, **shape.options)
    assert bool(out[:, :2, 20:].isnan().all())
    assert bool(out[:, :, :16].isfinite().all()) and bool(out[:, 2:].isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rows_whose_scores_overflow_are_as_in_softmax(sign: float, backend: str) -> None:
    """NaN where any is infinity or all are -infinity, in the gradients of queries too, which is no row that reads no
    key; a weight is 0 where one of several is -infinity."""
    shape = Shape(70, 70, heads=2, kv_heads=1)
    q, k, v, bias, grad = shape.tensors(torch.float32)
    first, own = shape.positions()
    bias, q[:, 0], k[:, :, :, 0] = torch.zeros_like(bias), 0, 0
    bias[:, :, 40] = -torch.inf
    q[:, :, :, 0], k[:, :, :20, 0] = 0, 4e19
    q[:, 0, :, 0] = sign * 4e19  # a score is 4e38: all that 20 queries see, some of the others; none of head 1
    found = results(
        block_bias_attention, (q, k, v, bias, grad), torch.float32, first, own, block_size=16, backend=backend
    )  # fmt: skip
    rows = torch.zeros(2, 70, dtype=torch.bool, device=DEVICE)
    rows[0, : 20 if sign < 0 else 70] = True
    rows[:, 40] = False
    assert torch.equal(found[0][0].isnan().all(-1), rows) and torch.equal(found[0][0].isnan().any(-1), rows)
    assert torch.equal(found[1][0].isnan().all(-1), rows) and not bool(found[0][:, :, 40].any())
    for i in range(60, 70):  # behind those that overflow
        weights = (q[0, 1, i] @ k[0, 0, : i + 1].mT * q.shape[3] ** -0.5).softmax(-1)
        torch.testing.assert_close(found[0][0, 1, i], weights @ v[0, 0, : i + 1])
        if sign < 0:
            torch.testing.assert_close(found[0][0, 0, i], v[0, 0, 20 : i + 1].mean(0))


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_documents_in_any_order(backend: str) -> None:
    """Of queries, and ones that come back: as each query has it alone."""
    shape = Shape(90, 90, documents=(33, 20, 37))
    inputs, positions = shape.tensors(torch.float32), shape.positions()
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    shuffled = [inputs[i] if i in (1, 2) else inputs[i][:, :, order] for i in range(5)]
    expected = results(block_bias_attention, inputs, torch.float32, *positions, backend=backend, **shape.options)
    moved = tuple(x[:, order] for x in positions)
    found = results(block_bias_attention, shuffled, torch.float32, *moved, backend=backend, **shape.options)
    for i, (ours, other) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(ours, other if i in (2, 3) else other[:, :, order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_any_strides_give_the_same_bits(backend: str) -> None:
    shape = SHAPES["alibi documents"]
    inputs, positions = shape.tensors(torch.float32), shape.positions()

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        options = shape.options | dict(backend=backend)
        return results(block_bias_attention, tensors, torch.float32, *positions, **options)

    check_any_strides(run, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n_queries", "n_keys", "n_blocks"), [(0, 5, 2), (5, 0, 0), (5, 0, 1), (5, 5, 0)])
def test_nothing_to_attend_to(n_queries: int, n_keys: int, n_blocks: int, backend: str) -> None:
    q, k, v, _, grad = Shape(n_queries, max(n_keys, 1)).tensors(torch.float32)
    k, v = k[:, :, :n_keys], v[:, :, :n_keys]
    bias = torch.zeros(1, 4, n_queries, n_blocks, device=DEVICE)
    first = torch.zeros(1, n_queries, dtype=torch.int64, device=DEVICE)
    inputs = (q, k, v, bias, grad)
    found = results(block_bias_attention, inputs, torch.float32, first, first - 1, block_size=4, backend=backend)
    for ours, x in zip(found, (q, q, k, v, bias), strict=True):
        assert ours.shape == x.shape and not bool(ours.any())


@pytest.mark.parametrize("backend", BACKENDS[:1])
@settings(max_examples=12)
@given(
    n_keys=st.integers(1, 120), n_queries=st.integers(1, 80), size=st.integers(1, 40), repeat=st.integers(1, 3),
    cut=st.floats(0, 1), live=st.floats(0, 1), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_sizes(
    n_keys: int, n_queries: int, size: int, repeat: int, cut: float, live: float, seed: int, backend: str
) -> None:
    documents = (int(cut * n_keys), n_keys - int(cut * n_keys))
    shape = Shape(n_queries, n_keys, block_size=size, heads=repeat, kv_heads=1, documents=documents, live=live)
    inputs, positions = shape.tensors(torch.float32, seed), shape.positions()
    ours, theirs = (
        results(block_bias_attention, inputs, torch.float32, *positions, backend=b, **shape.options)
        for b in (backend, "torch")
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(bias=torch.zeros(1, 4, 6, 3).half()), "bias must be torch.float32 on cpu, got torch.float16"),
        (dict(bias=torch.zeros(1, 2, 6, 3)), r"bias must be \(1, 4, 6, C\): one of each .*, got \(1, 2, 6, 3\)"),
        (dict(bias=torch.zeros(1, 4, 6, 2)), "bias must have a column for each block of 2 keys .*, 3, got 2"),
        (dict(first_key=torch.zeros(6)), "first_key must be torch.int32 or torch.int64 on cpu, got torch.float32"),
        (dict(own_key=torch.zeros(6).int()), r"own_key must be \(1, 6\), got \(6,\)"),
        (dict(first_key=torch.full((1, 6), -1)), "first_key must be at least 0, got -1"),
        (dict(own_key=torch.full((1, 6), 6)), "own_key must lie below the number of keys, 6, got 6"),
        (dict(block_size=0), "block_size must lie in 1 ... 1048576, got 0"),
        (dict(block_size=2**31), "block_size must lie in 1 ... 1048576, got 2147483648"),
        (dict(scale=-1.0), "scale must be positive"),
        (dict(backend="flex"), "backend must be one of auto, triton, torch, got 'flex'"),
    ],
)
def test_errors_name_the_value(changes: dict[str, Any], message: str) -> None:
    q, k, v, _, _ = (x.cpu() for x in Shape(6, 6).tensors(torch.float32))
    own = torch.arange(6)[None]
    usual = dict(bias=torch.zeros(1, 4, 6, 3), first_key=torch.zeros_like(own), own_key=own, block_size=2)
    with pytest.raises(ValueError, match=message):
        block_bias_attention(q, k, v, **usual | changes)


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_what_the_kernels_do_not_take_is_named(backend: str) -> None:
    own = torch.zeros(1, 3, dtype=torch.int64, device=DEVICE)
    double = [draw(1, 1, 3, 16, dtype=torch.float64) for _ in range(3)]
    bias = torch.zeros(1, 1, 3, 1, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match="float64"):
        block_bias_attention(*double, bias, own, own, block_size=4, backend=backend)
