"""The Triton kernels behind entmax_attention: statistics, position bias, same bits, odd inputs and sizes.

Runs on CUDA where there is one, else in Triton's interpreter (TRITON_INTERPRET=1, at small sizes).
"""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import kernels.alpha_entmax.results
from kernels import entmax_attention
from tests.kernels.conftest import CASES, HEADS, SLOPES, Case
from tests.kernels.helpers import (
    CUDA,
    DEVICE,
    EPS,
    MIXED,
    NAMES,
    compute,
    draw_qkv,
    int32,
    needs_triton,
    operators,
    options_of,
    per_head,
)

pytestmark = needs_triton


# Statistics


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_statistics_equal_the_reference(case: Case) -> None:
    q, k, v, _ = (x.detach().to(DEVICE) for x in case.tensors(torch.float32, seed=3))
    options = dict(alpha=1.5, return_stats=True, **options_of(case))
    _, expected = entmax_attention(q.double(), k.double(), v.double(), backend="reference", **options)
    _, actual = entmax_attention(q, k, v, backend="triton", **options)
    for name in ("support", "live_tiles", "total_tiles"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert actual.passes.shape == (case.batch, HEADS) and (actual.passes >= 2).all()


# Position bias


STEEP = [1.0, 0.5, 0.0, 0.125]


def far_inputs() -> tuple[Tensor, ...]:
    """A long row per head, with a key far away (number 100) whose score outweighs every distance."""
    q, k, v, _ = (x.detach() for x in draw_qkv(4, 4, 70, 1700))
    q[..., 0], k[..., 0] = 4.0, 0.0
    k[:, :, 100, 0] = 3000.0
    return q, k, v


@pytest.mark.parametrize("alpha", [1.5, 1.1])
def test_skipping_far_keys_changes_nothing(alpha: float) -> None:
    """But for rounding: the scan visits the first tiles early only where it skips nothing, so refinement may start from
    another bound. Then tau differs by a few units in the last place of its terms, and weights by beta times that."""
    slopes = torch.tensor(STEEP, device=DEVICE)
    for q, k, v in ([x.detach() for x in draw_qkv(4, 2, 70, 1700)[:3]], far_inputs()):
        results = [
            operators(q, k, v, per_head(alpha).detach(), alibi_slopes=slopes, gradient=True, skip_far=skip_far)[0]
            for skip_far in (True, False)
        ]
        size = (alpha - 1) * 0.25 * (q.norm(dim=-1).amax() * k.norm(dim=-1).amax()).item()  # of z without bias
        rounding_of_tau = 2 * EPS * max(1.0, size)
        assert (results[0].tau - results[1].tau).abs().max() <= rounding_of_tau
        allowed = (rounding_of_tau / (alpha - 1) + 2 * EPS) * v.abs().max()
        assert (results[0].out - results[1].out).abs().max() <= allowed


def test_far_keys_are_skipped(monkeypatch) -> None:
    """Told that all keys are 0, the kernels must miss the far key that they find otherwise, but for slope 0."""
    q, k, v = far_inputs()
    slopes = torch.tensor(STEEP, device=DEVICE)

    def attend() -> Tensor:
        return entmax_attention(q, k, v, alibi_slopes=slopes, backend="triton")

    far = v[:, :, 100:101].expand_as(q)
    found = attend()
    torch.testing.assert_close(found, far, atol=0, rtol=2 * EPS)
    norm = torch.linalg.vector_norm
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda *args, **kwargs: norm(*args, **kwargs) * 0)
    missed = attend()
    assert torch.equal(missed[:, 2], found[:, 2])
    assert ((missed - far).abs().amax(-1) > 1e-3)[:, [0, 1, 3]].all()


# Same bits


def test_deterministic() -> None:
    heads, kv_heads, n_tokens = (8, 2, 2000) if CUDA else (4, 2, 200)
    inputs = draw_qkv(heads, kv_heads, n_tokens, n_tokens, 64 if CUDA else 16, dtype=torch.bfloat16)
    alpha = per_head((MIXED * 2)[:heads], heads)
    slopes = torch.tensor((SLOPES * 2)[:heads], device=DEVICE)
    first, *others = (compute(inputs, alpha, "triton", alibi_slopes=slopes) for _ in range(4 if CUDA else 2))
    for other in others:
        for name, x, y in zip(NAMES, first, other, strict=True):
            assert torch.equal(x, y), name


@pytest.mark.parametrize("layout", ["transposed", "fused"])
def test_strided_inputs_give_the_same_bits(layout: str) -> None:
    """(B, T, H, D) seen as (B, H, T, D), as projections produce it, and slices of one (B, T, (H + 2 G) D) tensor."""
    q, k, v, weight = draw_qkv(4, 2, 75, 75, batch=2)
    expected = compute((q, k, v, weight), 1.5, "triton")
    parts = [x.detach().transpose(1, 2).contiguous() for x in (q, k, v)]
    if layout == "fused":
        parts = list(torch.cat(parts, 2).split([4, 2, 2], 2))
    strided = [x.transpose(1, 2).requires_grad_() for x in parts]
    assert not strided[0].is_contiguous()
    out = entmax_attention(*strided, alpha=1.5, backend="triton")
    upstream = weight.transpose(1, 2).contiguous().transpose(1, 2)
    actual = out.detach(), *torch.autograd.grad(out, strided, upstream)
    for name, x, y in zip(NAMES, actual, expected, strict=False):
        assert torch.equal(x, y), name


def test_expanded_upstream_gradient() -> None:
    q, k, v, weight = draw_qkv(2, 1, 70, 70)
    expected = compute((q, k, v, torch.ones_like(weight)), 1.5, "triton")[1:]
    entmax_attention(q, k, v, alpha=1.5, backend="triton").sum().backward()
    for x, y in zip((q, k, v), expected, strict=True):
        assert torch.equal(x.grad, y)


# Inputs that are not finite


def _broken(change: str) -> tuple[tuple[Tensor, ...], Tensor]:
    """Inputs of 150 tokens with something broken, and which queries that spoils."""
    q, k, v, weight = (x.detach() for x in draw_qkv(1, 1, 150, 150))
    row = torch.arange(150, device=DEVICE)
    if change == "NaN query":
        q[:, :, 70, 3] = torch.nan
        return (q, k, v, weight), row == 70
    q[..., 3] = torch.where(row % 2 == 0, 1.0, -1.0)
    k[:, :, 70, 3] = {"NaN key": torch.nan, "infinite key": torch.inf}[change]
    return (q, k, v, weight), (row >= 70) & ((row % 2 == 0) | (change == "NaN key"))


@pytest.mark.parametrize("alpha", [1.5, 1.3])
@pytest.mark.parametrize("change", ["NaN query", "NaN key", "infinite key"])
def test_what_is_not_finite_spoils_the_rows_that_see_it(change: str, alpha: float) -> None:
    """As in softmax attention: the rows' outputs and gradients and what reaches the keys that they see."""
    inputs, spoiled = _broken(change)
    whole = draw_qkv(1, 1, 150, 150)
    _, k, v, weight = (x.detach() for x in whole)
    clean = list(inputs)
    clean[0], clean[1] = (torch.where(x.isfinite(), x, y.detach()) for x, y in zip(inputs[:2], whole, strict=False))
    expected = compute(tuple(clean), alpha, "triton")
    out, dq, dk, dv = compute(inputs, alpha, "triton")
    assert torch.equal(out.isnan().any(-1)[0, 0], spoiled) and torch.equal(out.isnan().all(-1)[0, 0], spoiled)
    early = torch.arange(150, device=DEVICE) < 70
    # rows of the broken rows' tile (64 ... 69) may take another number of steps: u differs by two roundings, each of
    # the row's weights by beta times that
    slack = 2 * EPS / (alpha - 1) * 150 * v.norm(dim=-1).max()
    assert ((out - expected[0])[:, :, early].abs() <= slack).all()
    # their dq takes 0 * NaN from a broken key, as in softmax attention; other tiles never meet it
    for ours, theirs in ((out, expected[0]), (dq, expected[1])):
        assert torch.equal(ours[:, :, :64], theirs[:, :, :64])
    assert dq[0, 0, spoiled].isnan().all()
    last = int(spoiled.nonzero().max())
    assert dk[0, 0, : last + 1].isnan().all() and dv[0, 0, : last + 1].isnan().all()
    # softmax adds its mask to scores, so that an unseen NaN spoils rows too; on CUDA a score of -inf does
    if change == "NaN query" or (change == "infinite key" and not CUDA):
        softmax = scaled_dot_product_attention(*inputs[:3], is_causal=True)
        assert torch.equal(softmax.isnan().all(-1)[0, 0], spoiled)
    if change == "NaN query":  # the other queries' rows, and keys in tiles that only later ones see
        assert ((out - expected[0])[:, :, ~spoiled].abs() <= slack).all()
        slack = slack * weight.norm(dim=-1).max() * k.norm(dim=-1).max() / 4  # ds = w (dP - delta), scale 1 / 4
        assert ((dq - expected[1])[:, :, ~spoiled].abs() <= slack).all()
        assert dk[:, :, 128:].isfinite().all() and dv[:, :, 128:].isfinite().all()


@pytest.mark.parametrize("longest", [0, 1 << 15], ids=["tiles", "keys"])
def test_alpha_has_a_gradient_of_nan_where_a_score_is_nan(longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.alpha_entmax.results, "LONGEST_KEY_LIST", longest)
    q, k, v, weight = (x.detach() for x in draw_qkv(2, 2, 70, 70))
    expected = compute((q, k, v, weight), per_head(1.4, 2), "triton")[4]
    q[:, 0, 66, 3] = torch.nan
    found = compute((q, k, v, weight), per_head(1.4, 2), "triton")[4]
    assert found[0].isnan() and found[1] == expected[1]


@pytest.mark.parametrize("value", [-1e30, -math.inf])
def test_scores_of_minus_infinity_weigh_nothing(value: float) -> None:
    q, k, v, weight = (x.detach() for x in draw_qkv(1, 1, 90, 90))
    q[..., 3] = 1.0
    k[:, :, 70, 3] = value
    rest = [i for i in range(90) if i != 70]
    options = dict(alpha=1.3, causal=False)
    out = entmax_attention(q, k, v, backend="triton", **options)
    expected = entmax_attention(q, k[:, :, rest], v[:, :, rest], backend="triton", **options)
    # columns fall to other slots: weights differ by beta roundings of u in either
    torch.testing.assert_close(out, expected, atol=2 * EPS * (1 / 0.3) * float(v.abs().max()), rtol=0)
    if math.isfinite(value):
        _, dq, dk, dv = compute((q, k, v, weight), 1.3, "triton", causal=False)
        assert dq.isfinite().all() and (dk[:, :, 70] == 0).all() and (dv[:, :, 70] == 0).all()


# Edge sizes


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        (dict(n_queries=5, n_keys=0), {}),
        (dict(n_queries=5, n_keys=0), dict(causal=False)),
        (dict(n_queries=5, n_keys=5, batch=0), {}),
        (dict(n_queries=0, n_keys=5), {}),
    ],
    ids=str,
)
def test_nothing_to_attend_to(sizes: dict, options: dict) -> None:
    q, k, v, weight = draw_qkv(4, 2, **sizes)
    out, *gradients = compute((q, k, v, weight), per_head(1.5), "triton", **options)
    assert out.shape == q.shape and (out == 0).all()
    for x, gradient in zip((q, k, v), gradients, strict=False):
        assert gradient.shape == x.shape and (gradient == 0).all()
    assert (gradients[3] == 0).all()
    _, stats = entmax_attention(q, k, v, backend="triton", return_stats=True, **options)
    assert (stats.support == 0).all() and (stats.live_tiles == 0).all()


@pytest.mark.parametrize(
    ("options", "batch", "unseeing"),
    [
        (dict(), 1, slice(0, 37)),  # more queries than keys: the first stand before key 0
        (dict(kv_lens=(0, 33)), 2, slice(0, 37)),
        (dict(kv_lens=(0, 1), causal=False), 2, slice(0, 0)),
    ],
    ids=["before the keys", "key lengths", "key lengths full"],
)
def test_rows_that_see_nothing_are_zero(options: dict, batch: int, unseeing: slice) -> None:
    if "kv_lens" in options:
        options = {**options, "kv_lens": int32(*options["kv_lens"])}
    q, k, v, weight = draw_qkv(2, 1, 70, 33, batch=batch)
    out, dq, dk, dv, _ = compute((q, k, v, weight), per_head(1.4, 2), "triton", **options)
    assert (out[:, :, unseeing] == 0).all() and (dq[:, :, unseeing] == 0).all()
    if batch == 2:
        assert all((x[0] == 0).all() for x in (out, dq, dk, dv))
    assert (out[-1, :, 37:] != 0).any() and all(x.isfinite().all() for x in (out, dq, dk, dv))


def test_one_token_returns_its_value() -> None:
    q, k, v, _ = (x.detach() for x in draw_qkv(2, 2, 1, 1))
    torch.testing.assert_close(entmax_attention(q, k, v, backend="triton"), v, atol=0, rtol=2 * EPS)
