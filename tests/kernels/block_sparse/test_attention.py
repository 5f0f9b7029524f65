"""Block-Sparse FlashAttention against its definition: the blocks it keeps, errors, dense limits, chunks, odd inputs.

The Triton kernel runs on CUDA where there is one, else in Triton's interpreter (TRITON_INTERPRET=1, at small sizes).
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels import BlockSparseStats, block_sparse_softmax_attention
from kernels.block_sparse.reference import KEY_BLOCK, QUERY_BLOCK, block_maxima
from kernels.common.backends import INTERPRETED
from tests.kernels.helpers import CUDA, DEVICE, EPS, draw, needs_cuda, needs_triton

BACKENDS = [pytest.param("triton", marks=needs_triton), "torch"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Shape:
    n_queries: int
    n_keys: int
    causal: bool = True
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 16
    batch: int = 1
    slopes: tuple[float, ...] | None = None

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        sizes = (self.heads, self.n_queries), (self.kv_heads, self.n_keys), (self.kv_heads, self.n_keys)
        q, k, v = (
            draw(self.batch, *size, self.head_dim, seed=3 * seed + i, dtype=dtype) for i, size in enumerate(sizes)
        )
        return q, k, v

    @property
    def options(self) -> dict[str, Any]:
        slopes = None if self.slopes is None else torch.tensor(self.slopes, device=DEVICE)
        return dict(causal=self.causal, alibi_slopes=slopes)


SHAPES = {
    "causal": Shape(300, 300, batch=2),
    "full": Shape(300, 300, causal=False, kv_heads=2),
    "chunk on the grid": Shape(207, 463, head_dim=40),
    "chunk off the grid": Shape(150, 333, heads=4, kv_heads=2),
    "full chunk off the grid": Shape(150, 333, causal=False),
    "decode": Shape(1, 333, causal=False),
    "more queries than keys": Shape(333, 70),
    "more queries than keys, full": Shape(333, 70, causal=False),
    "one token": Shape(1, 1),
    "alibi": Shape(300, 300, slopes=(0.02, 0.0)),
    "alibi full": Shape(205, 300, causal=False, slopes=(0.02, 0.0)),
}
LARGE_SHAPES = {
    "64": Shape(2111, 2111, heads=4, kv_heads=2, head_dim=64),
    "128": Shape(2111, 2111, heads=4, kv_heads=4, head_dim=128),
    "256": Shape(1111, 1311, head_dim=256),
    "full 64": Shape(1500, 2300, causal=False, head_dim=64),
    "alibi 128": Shape(4500, 4500, head_dim=128, slopes=(0.01, 0.0)),
}


def thresholds_in_gaps(q: Tensor, k: Tensor, share: float, **options: Any) -> Tensor:
    """float32 (H, P) that keep about `share` of each row of blocks, as far from any block's largest score as the gaps
    between them allow, so that rounding decides no block: of the gaps around the wanted rank the widest."""
    offset = k.shape[2] - q.shape[2]
    n_positions = -(-k.shape[2] // QUERY_BLOCK)
    thresholds = torch.full((q.shape[1], n_positions), -torch.inf, device=q.device)
    for block, maxima in block_maxima(q.double(), k.double(), **options):
        if block.index < max(offset // QUERY_BLOCK, 0) or maxima.shape[2] < 2:
            continue
        rows = maxima.transpose(0, 1).flatten(1).sort(-1, descending=True).values  # [H, B * key blocks]
        n = rows.shape[1]
        low = min(max(round((share - 0.15) * n), 0), n - 2)
        high = max(min(round((share + 0.15) * n) + 1, n - 1), low + 1)
        gaps = (rows[:, low:high] - rows[:, low + 1 : high + 1]).nan_to_num(0, 0, 0)
        best = low + gaps.argmax(-1, keepdim=True)
        middle = (rows.gather(1, best) + rows.gather(1, best + 1)) / 2
        thresholds[:, max(block.index, 0)] = middle[:, 0].float()
    return thresholds


def run(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, BlockSparseStats]:
    result = block_sparse_softmax_attention(q, k, v, return_stats=True, **options)
    assert isinstance(result, tuple)
    return result


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    causal: bool,
    alibi_slopes: Tensor | None,
    query_block: int = QUERY_BLOCK,
) -> Tensor:
    """What plain PyTorch gives in the inputs' dtype for these kept blocks: products and weights rounded to it."""
    n_queries, n_keys, repeat = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q @ k.mT).to(wide) * q.shape[3] ** -0.5
    distance = torch.arange(n_keys - n_queries, n_keys, device=q.device)[:, None] - torch.arange(
        n_keys, device=q.device
    )
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(wide)[:, None, None] * distance
    gate = kept.repeat_interleave(KEY_BLOCK, -1)[..., :n_keys]
    offset = n_keys - n_queries
    index = torch.arange(offset, n_keys, device=q.device) // query_block - offset // query_block
    mask = gate[:, :, index] & (distance >= 0) if causal else gate[:, :, index]
    p = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0)
    return p.to(v.dtype) @ v


def check(shape: Shape, dtype: torch.dtype, backend: str, share: float = 0.4) -> None:
    q, k, v = shape.tensors(dtype)
    thresholds = thresholds_in_gaps(q, k, share, **shape.options)
    exact = (q.double(), k.double(), v.double())
    truth, expected = run(*exact, thresholds=thresholds, backend="torch", **shape.options)
    ours, stats = run(q, k, v, thresholds=thresholds, backend=backend, **shape.options)
    assert torch.equal(stats.kept, expected.kept)
    assert not bool((stats.kept & ~stats.visible).any())
    theirs = plain(q, k, v, expected.kept, **shape.options)
    # float32: two roundings of the result beside what plain PyTorch loses
    allowed = 2 * (theirs.double() - truth).norm() + (2 * EPS * truth.norm() if dtype == torch.float32 else 0)
    error = (ours.double() - truth).norm()
    assert error <= allowed, f"{error:.3e} > {allowed:.3e}, norm {truth.norm():.3e}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_keeps_the_blocks_of_the_definition_and_loses_what_plain_pytorch_loses(
    shape: Shape, dtype: torch.dtype, backend: str
) -> None:
    check(shape, dtype, backend)


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", LARGE_SHAPES.values(), ids=LARGE_SHAPES)
def test_at_length(shape: Shape, share: float, dtype: torch.dtype) -> None:
    if shape.head_dim > 128 and dtype == torch.float32:
        pytest.skip("not a case of the kernel")
    check(shape, dtype, "triton", share)


def test_definition_written_out() -> None:
    """The reference against loops over blocks and keys that share nothing with it."""
    shape = Shape(150, 333, heads=1, slopes=(0.02,))
    q, k, v = shape.tensors(torch.float64)
    thresholds = torch.tensor([[2.2, 2.6]], device=DEVICE)
    for causal in (True, False):
        options = shape.options | dict(causal=causal)
        out, stats = run(q, k, v, thresholds=thresholds, backend="torch", **options)
        assert 0 < stats.density.item() < 1
        for i in range(150):
            position, weights = i + 333 - 150, {}
            block = position // 128
            rows = [r for r in range(150) if (r + 183) // 128 == block]
            for j in range(6):
                keys = range(64 * j, min(64 * j + 64, 333))
                scores = {
                    (r, key): float(q[0, 0, r] @ k[0, 0, key]) / 4 - 0.02 * (r + 183 - key)
                    for r in (rows if i in (0, 9, 10, 149) else [i])
                    for key in keys
                    if not causal or key <= r + 183
                }
                if i not in (0, 9, 10, 149) or not scores:
                    continue
                if max(scores.values()) > float(thresholds[0, min(block, 1)]) or 128 * block // 64 <= j < 2 * block + 2:
                    weights |= {key: scores[i, key] for key in keys if (i, key) in scores}
            if weights:
                p = torch.tensor(list(weights.values()), dtype=torch.float64).softmax(0).to(DEVICE)
                torch.testing.assert_close(out[0, 0, i], p @ v[0, 0, list(weights)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("endless", [True, False], ids=["minus infinity", "None"])
@pytest.mark.parametrize("causal", [True, False])
def test_without_thresholds_it_is_dense_softmax_attention(causal: bool, endless: bool, backend: str) -> None:
    q, k, v = Shape(300, 300, heads=4, kv_heads=2).tensors(torch.float32)
    thresholds = torch.full((4, 3), -torch.inf, device=DEVICE) if endless else None
    out, stats = run(q, k, v, thresholds=thresholds, causal=causal, backend=backend)
    exact = (x.double() for x in (q, k, v))
    truth = scaled_dot_product_attention(*exact, is_causal=causal, enable_gqa=True)
    theirs = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    allowed = 2 * (theirs.double() - truth).norm() + 2 * EPS * truth.norm()
    assert (out.double() - truth).norm() <= allowed
    assert bool((stats.density == 1).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_skipped_values_are_not_read(backend: str) -> None:
    """NaN in values of blocks that no query keeps stays out of the result."""
    shape = Shape(320, 320, heads=1)
    q, k, v = shape.tensors(torch.float32)
    k[:, :, 64:128] *= 0.01  # no score of the second block of keys is large
    thresholds = torch.full((1, 3), 1.0, device=DEVICE)
    out, stats = run(q, k, v, thresholds=thresholds, backend=backend)
    assert not bool(stats.kept[0, 0, 1:, 1].any())
    poisoned = v.clone()
    poisoned[:, :, 64:128] = torch.nan
    again, _ = run(q, k, poisoned, thresholds=thresholds, backend=backend)
    assert torch.equal(again[:, :, QUERY_BLOCK:], out[:, :, QUERY_BLOCK:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend: str) -> None:
    shape = Shape(320, 320)
    q, k, v = (x.bfloat16() for x in shape.tensors(torch.float32))
    thresholds = torch.full((shape.heads, 3), 1.0, device=DEVICE)
    out, stats = run(q, k, v, thresholds=thresholds, backend=backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        again, counted = run(q, k, v, thresholds=thresholds, backend=backend)
    assert torch.equal(out, again) and torch.equal(stats.kept, counted.kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_on_the_grid_decide_as_the_whole(backend: str) -> None:
    shape = Shape(420, 420)
    q, k, v = shape.tensors(torch.float32)
    thresholds = thresholds_in_gaps(q, k, 0.4, causal=True)
    whole, stats = run(q, k, v, thresholds=thresholds, backend=backend)
    start = 256
    parts = [(0, start), (start, 420)]
    chunks = [run(q[:, :, a:b], k[:, :, :b], v[:, :, :b], thresholds=thresholds, backend=backend) for a, b in parts]
    assert torch.equal(chunks[1][1].kept, stats.kept[:, :, 2:])
    assert torch.equal(chunks[0][1].kept, stats.kept[:, :, :2, :4])
    torch.testing.assert_close(torch.cat([out for out, _ in chunks], 2), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_past_the_last_threshold_reuse_it(backend: str) -> None:
    q, k, v = Shape(520, 520).tensors(torch.float32)
    thresholds = thresholds_in_gaps(q, k, 0.4, causal=True)[:, :3]
    spread = torch.cat([thresholds, thresholds[:, -1:].expand(-1, 2)], 1)
    short, long = (run(q, k, v, thresholds=x, backend=backend) for x in (thresholds, spread))
    assert torch.equal(short[1].kept, long[1].kept) and torch.equal(short[0], long[0])
    assert short[1].density.max() < 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("where", "spoilt"), [("q", slice(290, 291)), ("k", slice(290, None)), ("v", slice(256, None))]
)
def test_nan_spoils_the_rows_that_read_it(where: str, spoilt: slice, backend: str) -> None:
    """Of v also earlier rows of the same blocks, which give the key weight 0."""
    tensors = dict(zip("qkv", Shape(300, 300, heads=1).tensors(torch.float32), strict=True))
    tensors[where][0, 0, 290] = torch.nan
    out, _ = run(**tensors, thresholds=torch.full((1, 3), 2.0, device=DEVICE), backend=backend)
    expected = torch.zeros(300, dtype=torch.bool, device=DEVICE)
    expected[spoilt] = True
    assert torch.equal(out[0, 0].isnan().any(-1), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n_queries", "n_keys"), [(0, 5), (5, 0)])
def test_nothing_to_attend_to(n_queries: int, n_keys: int, backend: str) -> None:
    q, k, v = Shape(n_queries, n_keys).tensors(torch.float32)
    out, stats = run(q, k, v, thresholds=torch.zeros(2, 1, device=DEVICE), backend=backend)
    assert out.shape == q.shape and not bool(out.any()) and not bool(stats.kept.any())


@pytest.mark.skipif(not (CUDA or INTERPRETED), reason="needs a CUDA device or TRITON_INTERPRET=1")
@settings(max_examples=12)
@given(
    n_keys=st.integers(1, 400),
    n_queries=st.integers(1, 300),
    causal=st.booleans(),
    seed=st.integers(0, 1000),
    level=st.floats(1.0, 5.0),
)
def test_any_length(n_keys: int, n_queries: int, causal: bool, seed: int, level: float) -> None:
    q, k, v = Shape(n_queries, n_keys, heads=1, causal=causal).tensors(torch.float64, seed)
    q, k, v = (x.float() for x in (q, k, v))
    maxima = torch.cat([m.flatten() for _, m in block_maxima(q.double(), k.double(), causal=causal)])
    around = maxima[maxima.isfinite()]
    # clear of every block's largest score by far more than float32 rounds a sum of 16 products
    while bool(((around - level).abs() < 1e-4).any()):
        level += 3e-4
    thresholds = torch.full((1, 2), level, device=DEVICE)
    ours, theirs = (run(q, k, v, thresholds=thresholds, causal=causal, backend=b) for b in ("triton", "torch"))
    assert torch.equal(ours[1].kept, theirs[1].kept)
    torch.testing.assert_close(ours[0], theirs[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(thresholds=torch.zeros(3, 4)), r"thresholds must be \(2, P\).*got \(3, 4\)"),
        (dict(thresholds=torch.zeros(2)), r"thresholds must be \(2, P\).*got \(2,\)"),
        (dict(thresholds=torch.zeros(2, 1, dtype=torch.float64)), "float32 on cpu, got torch.float64"),
        (dict(alibi_slopes=torch.ones(3)), r"alibi_slopes must be \(2,\).*got \(3,\)"),
        (dict(scale=-1.0), "scale must be positive and finite, got -1.0"),
        (dict(backend="fast"), "backend must be one of auto, triton, torch, got 'fast'"),
    ],
)
def test_errors_name_the_value(changes: dict[str, Any], message: str) -> None:
    q, k, v = (x.cpu() for x in Shape(10, 10).tensors(torch.float32))
    with pytest.raises(ValueError, match=message):
        block_sparse_softmax_attention(q, k, v, **dict(thresholds=torch.zeros(2, 1)) | changes)


def test_gradients_are_refused() -> None:
    q, k, v = Shape(10, 10).tensors(torch.float32)
    with pytest.raises(RuntimeError, match="no backward pass: call it under torch.no_grad"):
        block_sparse_softmax_attention(q.requires_grad_(), k, v, thresholds=None)
    with torch.no_grad():
        block_sparse_softmax_attention(q, k, v, thresholds=None)
