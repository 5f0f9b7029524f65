"""Decoding (one query per row) by the Triton kernels that split keys, against the reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.alpha_entmax.attention
import kernels.alpha_entmax.decode
from kernels import entmax_attention
from kernels.alpha_entmax.decode import SOLVER_BLOCK, decode_scores, decode_threshold, decode_values
from tests.kernels.helpers import (
    DEVICE,
    EPS,
    MIXED,
    SIXTEEN_BITS,
    draw,
    int32,
    needs_cuda,
    needs_triton,
    per_head,
    plain_attention,
)

pytestmark = needs_triton
SLOPES = [1.0, 0.5, 0.0, 0.01]
OPTIONS: list[dict[str, Any]] = [
    {},
    dict(window=70),
    dict(alibi_slopes=SLOPES),
    dict(kv_lens=(300, 0, 65)),
    dict(kv_lens=(300, 1, 64), window=70, alibi_slopes=SLOPES),
    dict(scale=3.0, causal=False),
]


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Options with their tensors; three rows where they have key lengths."""
    made = dict(options)
    if "alibi_slopes" in made:
        made["alibi_slopes"] = torch.tensor(made["alibi_slopes"], device=DEVICE)
    if "kv_lens" in made:
        made["kv_lens"] = int32(*made["kv_lens"])
    return made


def inputs(
    options: dict[str, Any],
    n_keys: int = 300,
    kv_heads: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    batch = 3 if "kv_lens" in options else 8  # one row's rounding may be lucky
    sizes = [(4, 1), (kv_heads, n_keys), (kv_heads, n_keys)]
    q, k, v = (draw(batch, *size, head_dim, seed=i, dtype=dtype) for i, size in enumerate(sizes))
    return q, k, v


def check(q: Tensor, k: Tensor, v: Tensor, alpha: float | Tensor, **options: Any) -> Tensor:
    """The output, within 2x of what plain PyTorch loses in the inputs' dtype, and two roundings of averaged |v|."""
    exact = alpha.double() if isinstance(alpha, Tensor) else alpha
    truth, sizes = (
        entmax_attention(q.double(), k.double(), x.double(), alpha=exact, backend="reference", **options)
        for x in (v, v.abs())
    )
    plain = plain_attention(q, k, v, alpha, **options)
    ours = entmax_attention(q, k, v, alpha=alpha, backend="triton", **options)
    assert ours.shape == q.shape and ours.dtype == q.dtype
    allowed = 2 * (plain.double() - truth).norm() + 2 * EPS * sizes.norm()
    assert (ours.double() - truth).norm() <= allowed
    return ours


@pytest.fixture(autouse=True)
def only_the_split_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels for many queries would give right results too."""

    def fail(*_: Any) -> None:
        raise AssertionError("decoding took the kernels for many queries")

    monkeypatch.setattr(kernels.alpha_entmax.attention, "run_attention", fail)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("alpha", [1.5, 2.0, MIXED], ids=str)
@torch.no_grad()
def test_float32_loses_what_plain_pytorch_loses(alpha: float | list[float], options: dict[str, Any]) -> None:
    q, k, v = inputs(options)
    out = check(q, k, v, alpha if isinstance(alpha, float) else per_head(alpha), **given(options))
    if 0 in options.get("kv_lens", ()):
        assert (out[1] == 0).all()


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_16_bits_lose_what_plain_pytorch_loses(options: dict[str, Any], dtype: torch.dtype) -> None:
    check(*inputs(options, dtype=dtype), per_head(MIXED), **given(options))


@pytest.mark.parametrize("n_keys", [1, 2, 63, 64, 65, 129])
@torch.no_grad()
def test_numbers_of_keys(n_keys: int) -> None:
    check(*inputs({}, n_keys), per_head(MIXED))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("head_dim", [16, 24])
@torch.no_grad()
def test_grouped_heads_and_padded_head_dims(head_dim: int, kv_heads: int) -> None:
    check(*inputs({}, 130, kv_heads, head_dim), per_head(MIXED))


@pytest.mark.parametrize("n_keys", [SOLVER_BLOCK + 300, pytest.param(131072 + 5, marks=needs_cuda)])
@torch.no_grad()
def test_more_keys_than_one_block_of_the_solver(n_keys: int) -> None:
    """Small scores near alpha 1 (all keys have weight), large ones (few have)."""
    for size in (0.03, 0.1, 0.3, 3.0):
        q, k, v = (draw(1, 1, n, 16, seed=i) for i, n in enumerate((1, n_keys, n_keys)))
        check(q * size, k, v, per_head([1.1], 1))
        check(q * size, k, v, 1.5)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@torch.no_grad()
def test_head_dims_at_length(head_dim: int, dtype: torch.dtype) -> None:
    options = dict(kv_lens=(5000, 17, 4096), alibi_slopes=SLOPES)
    check(*inputs(options, 5000, 2, head_dim, dtype), per_head(MIXED), **given(options))


@torch.no_grad()
def test_views_of_a_cache() -> None:
    """Rows and slots of a larger memory, keys and values interleaved, as model.kv_cache hands them over."""
    memory = draw(2, 3, 2, 500, 16)
    k, v = (x[:2, :, 100:230] for x in memory)
    q = draw(2, 4, 3, 16, seed=5)[:, :, 1:2]
    assert not k.is_contiguous() and not q.is_contiguous()
    out = check(q, k, v, 1.5)
    assert torch.equal(out, entmax_attention(q, k.contiguous(), v.contiguous(), alpha=1.5, backend="triton"))


@torch.no_grad()
def test_many_splits_give_one_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another split adds the same terms in another order; the same split gives the same bits.

    Weights sum to 1, so that a term has an error of EPS |v| for each addition it is in: 6 halvings of a tile and 11
    tiles, in the output and in the total that it is divided by, in either of the two results.
    """
    q, k, v = inputs({}, 700)
    results = []
    for programs in (1, 4, 100, 100):
        monkeypatch.setattr(
            kernels.alpha_entmax.decode, "program_count", lambda launch, device, n_tasks, n=programs: min(n, n_tasks)
        )
        results.append(check(q, k, v, per_head(MIXED)))
    assert torch.equal(results[2], results[3])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=4 * (6 + 11) * EPS * v.abs().max().item(), rtol=0)


@torch.no_grad()
def test_values_without_weight_are_not_read() -> None:
    """A tile of values that no head of the group gives weight may hold anything."""
    q, k, v = inputs({}, 192, kv_heads=1)
    k[:, :, 64:128] = 0
    q[..., 0], k[..., 0] = 20.0, 0.0
    k[:, :, :64, 0], k[:, :, 128:, 0] = 20.0, 20.0
    expected = entmax_attention(q, k, v, alpha=1.5, backend="triton")
    v[:, :, 64:128] = torch.nan
    assert torch.equal(entmax_attention(q, k, v, alpha=1.5, backend="triton"), expected)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@torch.no_grad()
def test_scores_that_are_not_finite(broken: float) -> None:
    """NaN and +inf spoil the heads that see them, -inf gets weight 0."""
    q, k, v = inputs({}, 200, kv_heads=4)
    q[:, 1] = q[:, 1].abs() + 0.1
    k[:, 1, 150] = broken
    out = entmax_attention(q, k, v, alpha=1.5, backend="triton")
    others = [0, 2, 3]
    assert out[:, others].isfinite().all()
    if broken == -torch.inf:
        keep = torch.arange(200, device=DEVICE) != 150
        torch.testing.assert_close(
            out, entmax_attention(q, k[:, :, keep], v[:, :, keep], alpha=1.5, backend="reference"), atol=1e-6, rtol=1e-5
        )
    else:
        assert out[:, 1].isnan().all()


@torch.no_grad()
def test_rows_whose_scores_are_all_minus_infinity_are_zero() -> None:
    q, k, v = inputs({}, 100, kv_heads=4)
    q[:, 2] = 1.0
    k[:, 2] = -torch.inf
    out = entmax_attention(q, k, v, alpha=1.5, backend="triton")
    assert (out[:, 2] == 0).all() and out.isfinite().all()


def test_gradients_and_statistics_take_the_other_kernels() -> None:
    q, k, v = inputs({}, 70)
    with pytest.raises(AssertionError, match="many queries"):
        entmax_attention(q.requires_grad_(), k, v, backend="triton")
    with torch.no_grad(), pytest.raises(AssertionError, match="many queries"):
        entmax_attention(q, k, v, backend="triton", return_stats=True)


@needs_cuda
@torch.no_grad()
def test_a_new_length_compiles_nothing() -> None:
    functions = (decode_scores, decode_threshold, decode_values)

    def compiled_for(n_keys: int) -> int:
        q, k, v = inputs({}, n_keys, head_dim=64, dtype=torch.bfloat16)
        entmax_attention(q, k, v, alpha=per_head(MIXED), backend="triton")
        return sum(len(cache[0]) for f in functions for cache in f.device_caches.values())

    before = compiled_for(1000)
    assert [compiled_for(n) for n in (1001, 1, 16, 4096)] == [before] * 4
