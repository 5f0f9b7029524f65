"""Softmax attention over given blocks: errors against an explicit mask in float64, what is read, alignment, odd inputs.

The Triton kernel runs on CUDA where there is one, else in Triton's interpreter (TRITON_INTERPRET=1, at small sizes).
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import block_sparse_softmax_attention
from kernels.block_sparse.attention import runs_on_triton
from kernels.block_sparse.reference import QUERY_BLOCKS, grid_of_blocks
from kernels.common.tiles import LIST_CHUNK
from tests.kernels.block_sparse.test_attention import (
    BACKENDS,
    DTYPES,
    LARGE_SHAPES,
    SHAPES,
    Shape,
    plain,
    run,
    thresholds_in_gaps,
)
from tests.kernels.block_sparse.test_designs import use_design
from tests.kernels.helpers import DEVICE, EPS, needs_cuda

TOLERANCE = dict(atol=1e-5, rtol=1e-5)


def draw_blocks(shape: Shape, query_block: int, share: float = 0.5, seed: int = 0) -> Tensor:
    """bool (B, H, query blocks, key blocks), each kept with probability `share`; the first row of blocks has none."""
    grid = (shape.batch, shape.heads, *grid_of_blocks(shape.n_queries, shape.n_keys, query_block))
    blocks = torch.rand(grid, generator=torch.Generator().manual_seed(seed)) < share
    blocks[:, :, 0] &= blocks.shape[2] == 1
    return blocks.to(DEVICE)


def check(shape: Shape, dtype: torch.dtype, query_block: int, backend: str, share: float = 0.5) -> None:
    q, k, v = shape.tensors(dtype)
    blocks = draw_blocks(shape, query_block, share)
    truth = plain(q.double(), k.double(), v.double(), blocks, **shape.options, query_block=query_block)
    theirs = plain(q, k, v, blocks, **shape.options, query_block=query_block)
    ours, stats = run(q, k, v, blocks=blocks, query_block=query_block, backend=backend, **shape.options)
    assert torch.equal(stats.kept, blocks & stats.visible)
    # float32: two roundings of the result beside what plain PyTorch loses
    allowed = 2 * (theirs.double() - truth).norm() + (2 * EPS * truth.norm() if dtype == torch.float32 else 0)
    error = (ours.double() - truth).norm()
    assert error <= allowed, f"{error:.3e} > {allowed:.3e}, norm {truth.norm():.3e}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("query_block", QUERY_BLOCKS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_loses_what_plain_pytorch_loses(shape: Shape, query_block: int, dtype: torch.dtype, backend: str) -> None:
    check(shape, dtype, query_block, backend)


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("query_block", QUERY_BLOCKS)
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", LARGE_SHAPES.values(), ids=LARGE_SHAPES)
def test_at_length(shape: Shape, share: float, query_block: int, dtype: torch.dtype) -> None:
    if shape.head_dim > 128 and dtype == torch.float32:
        pytest.skip("not a case of the kernel")
    check(shape, dtype, query_block, "triton", share)


@pytest.mark.parametrize("backend", BACKENDS[:1])
@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "TMA"])
@pytest.mark.parametrize("query_block", QUERY_BLOCKS)
def test_both_ways_of_loading(
    query_block: int, descriptors: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = use_design(monkeypatch, False, descriptors)
    for name in ("chunk off the grid", "full chunk off the grid", "more queries than keys"):
        check(SHAPES[name], torch.bfloat16, query_block, backend)
    assert seen == [True] * 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_blocks_that_thresholds_keep_give_the_same(backend: str) -> None:
    for name in ("chunk off the grid", "alibi full"):
        shape = SHAPES[name]
        q, k, v = shape.tensors(torch.float32)
        thresholds = thresholds_in_gaps(q, k, 0.4, **shape.options)
        expected, stats = run(q, k, v, thresholds=thresholds, backend=backend, **shape.options)
        out, again = run(q, k, v, blocks=stats.kept, backend=backend, **shape.options)
        assert torch.equal(again.kept, stats.kept) and stats.density.max() < 1
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
def test_all_blocks_are_dense_attention(causal: bool, backend: str) -> None:
    q, k, v = Shape(300, 300, heads=4, kv_heads=2).tensors(torch.float32)
    dense, _ = run(q, k, v, causal=causal, backend=backend)
    for query_block in QUERY_BLOCKS:
        blocks = torch.ones(1, 1, *grid_of_blocks(300, 300, query_block), dtype=torch.bool, device=DEVICE)
        out, stats = run(q, k, v, blocks=blocks, query_block=query_block, causal=causal, backend=backend)
        torch.testing.assert_close(out, dense)
        assert bool((stats.density == 1).all()) and stats.kept.shape[:2] == (1, 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("query_block", QUERY_BLOCKS)
def test_only_given_blocks_are_read(query_block: int, backend: str) -> None:
    """No diagonal of their own: NaN keys and values of other blocks stay out, and rows that see no given key are 0."""
    q, k, v = Shape(320, 320, heads=1).tensors(torch.float32)
    blocks = torch.zeros(1, 1, *grid_of_blocks(320, 320, query_block), dtype=torch.bool, device=DEVICE)
    blocks[..., 2] = True  # keys 128 ... 191
    k[:, :, :128] = k[:, :, 192:] = v[:, :, :128] = v[:, :, 192:] = torch.nan
    out, stats = run(q, k, v, blocks=blocks, query_block=query_block, backend=backend)
    scores = (q[0, 0, 128:].double() @ k[0, 0, 128:192].double().T / 4).masked_fill(
        torch.arange(128, 192, device=DEVICE) > torch.arange(128, 320, device=DEVICE)[:, None], -torch.inf
    )
    torch.testing.assert_close(out[0, 0, 128:].double(), scores.softmax(-1) @ v[0, 0, 128:192].double(), **TOLERANCE)
    assert not bool(out[:, :, :128].any())
    assert stats.kept.sum() == -(-(320 - 128) // query_block)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lone", [(True, False), (False, True), (True, True)], ids=["batch", "heads", "both"])
def test_one_map_for_all_rows_or_heads(lone: tuple[bool, bool], backend: str) -> None:
    shape = Shape(150, 333, heads=4, kv_heads=2, batch=2)
    q, k, v = shape.tensors(torch.float32)
    blocks = draw_blocks(shape, 64)
    one = blocks[: 1 if lone[0] else None, : 1 if lone[1] else None]
    spread = one.expand_as(blocks).contiguous()
    ours, theirs = (run(q, k, v, blocks=x, query_block=64, backend=backend) for x in (one, spread))
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1].kept, theirs[1].kept)
    turned = run(q, k, v, blocks=spread.mT.contiguous().mT, query_block=64, backend=backend)  # strides of its own
    assert torch.equal(turned[0], ours[0])


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_lists_of_many_blocks(backend: str) -> None:
    """Around the number of blocks that are listed at once; the same inputs give the same bits."""
    n_keys = (LIST_CHUNK + 4) * 64 - 7
    q, k, v = Shape(70, n_keys, heads=1).tensors(torch.float32)
    blocks = torch.zeros(1, 1, *grid_of_blocks(70, n_keys, 128), dtype=torch.bool, device=DEVICE)
    blocks[..., [0, 31, LIST_CHUNK - 1, LIST_CHUNK, LIST_CHUNK + 3]] = True
    out, again = (run(q, k, v, blocks=blocks, backend=backend)[0] for _ in range(2))
    torch.testing.assert_close(out, run(q, k, v, blocks=blocks, backend="torch")[0])
    assert torch.equal(out, again)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n_queries", "n_keys"), [(0, 5), (5, 0)])
def test_nothing_to_attend_to(n_queries: int, n_keys: int, backend: str) -> None:
    q, k, v = Shape(n_queries, n_keys).tensors(torch.float32)
    blocks = torch.ones(1, 1, *grid_of_blocks(n_queries, n_keys, 128), dtype=torch.bool, device=DEVICE)
    out, stats = run(q, k, v, blocks=blocks, backend=backend)
    assert out.shape == q.shape and not bool(out.any()) and not bool(stats.kept.any())


@pytest.mark.parametrize("backend", BACKENDS[:1])
@settings(max_examples=12)
@given(
    n_keys=st.integers(1, 400), n_queries=st.integers(1, 300), causal=st.booleans(), seed=st.integers(0, 1000),
    query_block=st.sampled_from(QUERY_BLOCKS),
)  # fmt: skip
def test_any_length(n_keys: int, n_queries: int, causal: bool, seed: int, query_block: int, backend: str) -> None:
    shape = Shape(n_queries, n_keys, heads=1, causal=causal)
    tensors = shape.tensors(torch.float32, seed)
    blocks = draw_blocks(shape, query_block, seed=seed)
    options: dict[str, Any] = dict(blocks=blocks, query_block=query_block, causal=causal)
    ours, theirs = (run(*tensors, backend=b, **options) for b in (backend, "torch"))
    assert torch.equal(ours[1].kept, theirs[1].kept)
    torch.testing.assert_close(ours[0], theirs[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(thresholds=torch.zeros(2, 1)), "got thresholds and blocks: blocks say themselves what is kept"),
        (
            dict(blocks=torch.ones(2, 2, 2, 3).bool()),
            r"blocks must be \(1 or 1, 2 or 1, \*\(2, 3\)\), got \(2, 2, 2, 3",
        ),
        (dict(blocks=torch.ones(2, 2, 3).bool()), r"blocks must be \(1 or 1, 2 or 1.*got \(2, 2, 3\)"),
        (dict(query_block=64), r"blocks must end in \(3, 3\): blocks of 64 query positions.*got \(1, 2, 2, 3\)"),
        (dict(query_block=32), r"query_block must be one of \(128, 64\) with blocks.*got 32"),
        (dict(blocks=None, query_block=64), "and 128 without, got 64"),
        (dict(blocks=torch.ones(1, 2, 2, 3)), "blocks must be bool on cpu, got torch.float32"),
    ],
)
def test_errors_name_the_value(changes: dict[str, Any], message: str) -> None:
    q, k, v = (x.cpu() for x in Shape(150, 150).tensors(torch.float32))
    with pytest.raises(ValueError, match=message):
        block_sparse_softmax_attention(q, k, v, **dict(blocks=torch.ones(1, 2, 2, 3).bool()) | changes)


def test_what_runs_on_triton() -> None:
    q = Shape(3, 3, head_dim=160).tensors(torch.float32)[0]
    assert not runs_on_triton(q) and not runs_on_triton(q[..., :64].double())
    assert runs_on_triton(q[..., :64]) == runs_on_triton(q.bfloat16()) == (DEVICE == "cuda")
