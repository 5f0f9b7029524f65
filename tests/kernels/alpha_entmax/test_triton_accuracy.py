"""Errors and thresholds of the Triton kernels behind entmax_attention, against the oracle and the reference.

Runs on CUDA where there is one, else in Triton's interpreter (TRITON_INTERPRET=1, at small sizes).
"""

import math

import pytest
import torch
from torch import Tensor

import kernels.alpha_entmax.attention
import kernels.alpha_entmax.launches
import kernels.alpha_entmax.results
from benchmarks.oracle import attention_oracle
from kernels import entmax_attention
from kernels.alpha_entmax.reference import _bisect_threshold, entmax_reference
from kernels.alpha_entmax.threshold import power_of
from tests.kernels.conftest import CASES, SLOPES, Case
from tests.kernels.helpers import (
    CUDA,
    DEVICE,
    EPS,
    MIXED,
    NAMES,
    SIXTEEN_BITS,
    assert_errors,
    by_name,
    check_float32,
    compute,
    draw_qkv,
    int32,
    needs_cuda,
    needs_triton,
    operators,
    options_of,
    per_head,
    plain_attention,
    visible_scores,
)

pytestmark = needs_triton


FEW = ("causal", "alibi full", "documents", "key lengths")


@pytest.mark.parametrize(
    ("case", "alpha"),
    [(case, alpha) for alpha in (1.5, MIXED) for case in CASES]
    + [(by_name(name), alpha) for alpha in (1.05, 2.0) for name in FEW],
    ids=lambda x: x.name if isinstance(x, Case) else str(x),
)
def test_float32_loses_what_plain_pytorch_loses(case: Case, alpha) -> None:
    """Numbers take kernels of their own (1.5, 2); a tensor has a gradient."""
    check_float32(tuple(x.to(DEVICE) for x in case.tensors(torch.float32)), alpha, **options_of(case))


def test_position_bias_rounds_once() -> None:
    """slope / scale is no power of two, and equal scores leave weights to the bias alone."""
    q, k, v, _ = draw_qkv(1, 1, 64, 64)
    check_float32((torch.zeros_like(q), k, v, _), 1.5, alibi_slopes=torch.ones(1, device=DEVICE), scale=1.7)


@needs_cuda
@pytest.mark.timeout(1200)  # head dim 256 compiles for minutes
@pytest.mark.parametrize("head_dim", [40, 64, 80, 128, 256])
@pytest.mark.parametrize("options", [{}, dict(window=300), dict(alibi_slopes=torch.tensor(SLOPES))], ids=str)
def test_float32_at_length(options: dict, head_dim: int) -> None:
    case = Case("large", options, batch=1, n_queries=1501, n_keys=1501)
    inputs = tuple(x.to(DEVICE) for x in case.tensors(torch.float32, head_dim=head_dim))
    check_float32(inputs, MIXED, **options_of(case))


@pytest.mark.parametrize(
    "options",
    [
        dict(causal=True),
        dict(causal=False),
        dict(window=1100),
        dict(window=1100, alibi_slopes=torch.tensor([0.004])),
    ],
    ids=str,
)
def test_more_keys_than_one_chunk_of_the_scan(options: dict) -> None:
    inputs = draw_qkv(1, 1, 70, 2300)
    check_float32(inputs, [1.5], **{name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in options.items()})


def test_documents_cross_chunks_of_the_scan() -> None:
    n_tokens = 1500 if CUDA else 1220
    check_float32(draw_qkv(1, 1, n_tokens, n_tokens), [1.4], cu_seqlens=int32(0, 30, 1190, 1190, n_tokens))


@pytest.mark.parametrize("n_blocks", [1, 9, 10, 11, 30, 46, 50, *([1526] if CUDA else [])])
def test_the_order_of_the_scan_leaves_out_no_tile(n_blocks: int) -> None:
    """Equal scores: every tile has weight. Past the first and the 8 nearest, 37 or 41 or both divide the blocks of 128
    keys, or are more than they are."""
    q, k, v, _ = (x.detach() for x in draw_qkv(1, 1, 1, 128 * n_blocks, dtype=torch.float16))
    _, found = operators(q, torch.zeros_like(k), v, per_head(1.5, 1).detach())
    bits = (found.bits.view(-1, 1) >> torch.arange(32, device=DEVICE)) & 1
    assert bits.flatten()[: 2 * n_blocks].all()


@pytest.mark.parametrize("n_queries", [1, 5] if CUDA else [3])
def test_more_tiles_than_one_chunk_of_a_list(n_queries: int) -> None:
    """Flat scores: every tile is live, in the list of the queries as in their bits."""
    q, k, v, weight = draw_qkv(1, 1, n_queries, 33_100)
    inputs = (q * 0.05, k, v, weight)
    if CUDA:
        check_float32(inputs, 1.5, causal=False)
        return
    q, k, v, _ = (x.detach() for x in inputs)
    truth = entmax_attention(q.double(), k.double(), v.double(), backend="reference", causal=False)
    plain = entmax_attention(q, k, v, backend="reference", causal=False)
    ours, stats = entmax_attention(q, k, v, backend="triton", causal=False, return_stats=True)
    assert stats.live_tiles.item() > 512
    # two roundings of the result
    assert_errors((ours,), (plain,), (truth,), (2 * EPS * truth.norm(),))


# Lists of keys and lists of tiles


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_lists_of_tiles_alone(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lengths past LONGEST_KEY_LIST take."""
    monkeypatch.setattr(kernels.alpha_entmax.results, "LONGEST_KEY_LIST", 0)
    check_float32(tuple(x.to(DEVICE) for x in case.tensors(torch.float32)), MIXED, **options_of(case))


N_KEYS = 2500  # 40 tiles, more than marking looks at before it may stop


def scattered(near: float, far: float) -> tuple[Tensor, ...]:
    """Inputs of 70 queries whose scores with the first 36 tiles of keys spread by `near`, with the others by `far`."""
    q, k, v, weight = draw_qkv(1, 1, 70, N_KEYS)
    size = torch.where(torch.arange(N_KEYS, device=DEVICE) < 36 * 64, near, far)
    return q, (k.detach() * size[:, None]).requires_grad_(), v, weight


def passes_over_keys(inputs: tuple[Tensor, ...], alpha: float) -> tuple[list[int], Tensor]:
    """Which query tiles go over single keys, and int (query tiles, keys): the key bits."""
    q, k, v, _ = (x.detach() for x in inputs)
    _, found = operators(q, k, v, per_head(alpha, 1).detach(), causal=False, gradient=True)
    bits = (found.key_bits.view(2, -1, 1) >> torch.arange(32, device=DEVICE)) & 1
    return found.sparse[0, 0].tolist(), bits.flatten(1)[:, :N_KEYS]


@pytest.mark.parametrize(
    ("near", "far", "sparse"), [(3.0, 3.0, [1, 1]), (0.02, 0.02, [0, 0]), (0.02, 3.0, [1, 1]), (3.0, 0.02, [1, 1])]
)
def test_single_keys_where_they_are_few(near: float, far: float, sparse: list[int]) -> None:
    """Keys that hold weight anywhere in a query tile have their bit, wherever they stand; flat scores, which all keys
    share, go over tiles."""
    inputs = scattered(near, far)
    chosen, bits = passes_over_keys(inputs, 1.5)
    assert chosen == sparse
    scores = visible_scores(*(x.detach().double() for x in inputs[:2]), causal=False)[0, 0]
    held = (entmax_reference(scores, 1.5) > 1e-12).split(64)
    for tile, (choice, rows) in enumerate(zip(chosen, held, strict=True)):
        if choice:
            assert (bits[tile] >= rows.any(0)).all() and bits[tile].float().mean() < 0.7
    check_float32(inputs, [1.5], causal=False)


def test_entries_of_32_bits_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lists take past LONGEST_SHORT_ENTRY."""
    inputs, alpha = scattered(3.0, 0.02), per_head(1.5, 1)
    expected = compute(inputs, alpha, "triton", causal=False)
    monkeypatch.setattr(kernels.alpha_entmax.results, "LONGEST_SHORT_ENTRY", 0)
    asked = []
    monkeypatch.setattr(kernels.alpha_entmax.launches, "entry_dtype", lambda tiles: asked.append(tiles) or torch.int32)
    assert all(map(torch.equal, compute(inputs, alpha, "triton", causal=False), expected))
    assert asked


@needs_cuda
def test_single_keys_past_65536() -> None:
    """Queries and keys whose numbers need more than 16 bits: the last rows against the definition, all rows' gradients
    against passes over tiles."""
    n_tokens = 65_536 + 1000
    q, k, v, weight = (x.detach() for x in draw_qkv(1, 1, n_tokens, n_tokens, head_dim=64, dtype=torch.bfloat16))
    q = q * 2
    _, found = operators(q, k, v, per_head(1.5, 1).detach(), gradient=True)
    assert found.sparse[0, 0, -16:].all()
    inputs = (q, k, v, weight)
    ours = compute(inputs, per_head(1.5, 1), "triton")
    last = slice(n_tokens - 256, None)
    truth = entmax_attention(*(x.double() for x in (q[:, :, last], k, v)), alpha=1.5, backend="reference")
    plain = plain_attention(q[:, :, last], k, v, 1.5)
    assert_errors((ours[0][:, :, last],), (plain,), (truth,), (2 * EPS * truth.norm(),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.alpha_entmax.results, "LONGEST_KEY_LIST", 0)
        tiles = compute(inputs, per_head(1.5, 1), "triton")
    for name, mine, theirs in zip(NAMES, ours, tiles, strict=False):
        assert (mine.double() - theirs.double()).norm() <= 2 * torch.finfo(torch.bfloat16).eps * theirs.norm(), name


def test_a_tile_of_queries_that_stops_marking_beside_one_that_does_not() -> None:
    """The pass over keys meets queries of both kinds: those over tiles have row bits of whole tiles."""
    q, k, v, weight = scattered(3.0, 3.0)
    flat = torch.arange(70, device=DEVICE) < 64
    q = (q.detach() * torch.where(flat, 0.004, 1.0)[:, None]).requires_grad_()
    assert passes_over_keys((q, k, v, weight), 1.5)[0] == [0, 1]
    check_float32((q, k, v, weight), [1.5], causal=False)


# tokens, query heads, key/value heads, head dim, cu_seqlens, ALiBi
SHAPES: dict[str, tuple[int, int, int, int, tuple[int, ...] | None, bool]] = {
    "odd": (257, 2, 2, 16, None, False),
    "grouped": (193, 4, 1, 16, None, False),
    "packed": (150, 2, 2, 40, (0, 1, 64, 64, 140, 150), False),
    "alibi": (201, 2, 2, 128, None, True),
    "all": (141, 4, 2, 16, (0, 70, 71, 141), True),
}
LARGE_SHAPES: dict[str, tuple[int, int, int, int, tuple[int, ...] | None, bool]] = {
    "odd": (1111, 4, 4, 16, None, False),
    "odd 80": (1111, 4, 4, 80, None, False),
    "odd 256": (777, 4, 4, 256, None, False),
    "grouped": (1000, 8, 2, 128, None, False),
    "packed": (1500, 4, 4, 40, (0, 1, 64, 64, 700, 1499, 1500), False),
    "alibi": (1201, 4, 4, 128, None, True),
    "all": (901, 4, 1, 64, (0, 333, 334, 901), True),
}
FEW_COMBINATIONS = [
    ("odd", 1.05, torch.bfloat16),
    ("grouped", 1.1, torch.bfloat16),
    ("packed", 1.25, torch.bfloat16),
    ("alibi", 1.5, torch.bfloat16),
    ("all", 1.75, torch.bfloat16),
    ("grouped", 2.0, torch.bfloat16),
    ("packed", 1.05, torch.float16),
    ("all", 1.5, torch.float16),
    ("odd", 2.0, torch.float16),
]
ALL_COMBINATIONS = [
    (shape, alpha, dtype)
    for shape in LARGE_SHAPES
    for alpha in (1.05, 1.1, 1.25, 1.5, 1.75, 2.0)
    for dtype in SIXTEEN_BITS
]
CAPS = dict(zip(NAMES, (5e-3, 1e-2, 1e-2, 1e-2, 2e-2), strict=True))  # of relative norms in bfloat16


@pytest.mark.parametrize(("shape", "alpha", "dtype"), ALL_COMBINATIONS if CUDA else FEW_COMBINATIONS)
def test_sixteen_bits_against_the_oracle(shape: str, alpha: float, dtype: torch.dtype) -> None:
    """The oracle rounds only what a product takes: p, w and ds."""
    n_tokens, heads, kv_heads, head_dim, bounds, alibi = (LARGE_SHAPES if CUDA else SHAPES)[shape]
    inputs = draw_qkv(heads, kv_heads, n_tokens, n_tokens, head_dim, dtype=dtype, size=math.sqrt(2))
    cu_seqlens = None if bounds is None else int32(*bounds)
    slopes = torch.tensor([0.5**i for i in range(heads - 1)] + [0.0], device=DEVICE) if alibi else None
    options = dict(cu_seqlens=cu_seqlens, alibi_slopes=slopes)
    alphas = per_head(alpha, heads)
    truth = compute(inputs, alphas, "reference", torch.float64, **options)
    oracle = attention_oracle(*inputs, alphas, cu_seqlens, slopes)
    runs = [compute(inputs, alphas, "triton", **options)]
    if alpha in (1.5, 2.0):
        runs.append(compute(inputs, alpha, "triton", **options))
    for ours in runs:
        # two float32 roundings: products that a row's only key cancels to 0 in the oracle
        assert_errors(ours, tuple(oracle[x] for x in NAMES), truth, tuple(2 * EPS * x.norm() for x in truth))
        if dtype == torch.bfloat16:
            for name, mine, true in zip(NAMES, ours, truth, strict=False):
                assert (mine.double() - true).norm() <= CAPS[name] * true.norm(), name


def test_keys_with_much_in_common_lose_no_more_than_in_the_oracle() -> None:
    """As in trained models: rows of wide support, whose dq and dk are small differences of large sums."""
    heads, n_tokens = 2, 400 if CUDA else 150
    q, k, v, weight = draw_qkv(heads, 1, n_tokens, n_tokens, 64, dtype=torch.bfloat16)
    q, k, v = ((x.detach() * size + shift).requires_grad_() for x, size, shift in ((q, 0.1, 0), (k, 1, 2), (v, 1, 2)))
    alphas = per_head([1.3, 1.5], heads)
    truth = compute((q, k, v, weight), alphas, "reference", torch.float64)
    oracle = attention_oracle(q, k, v, weight, alphas)
    ours = compute((q, k, v, weight), alphas, "triton")
    assert_errors(ours, tuple(oracle[x] for x in NAMES), truth, tuple(2 * EPS * x.norm() for x in truth))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS if CUDA else [torch.float16], ids=str)
def test_gradients_do_not_show_the_last_step_of_the_threshold(dtype: torch.dtype) -> None:
    """In 16 bits the weighted sum takes the last step to first order, up to 0.05, where weights w change by far more
    than an output does: delta has to belong to the final ones, or dq gains a multiple of what the keys share."""
    q, k, v, weight = draw_qkv(1, 1, 64, 400, dtype=dtype)
    inputs = ((q.detach() * 0.5).requires_grad_(), (k.detach() + 3).requires_grad_(), v, weight)
    alphas = per_head(1.5, 1)
    truth = compute(inputs, alphas, "reference", torch.float64)
    oracle = attention_oracle(*inputs, alphas)
    ours = compute(inputs, alphas, "triton")
    assert_errors(ours, tuple(oracle[x] for x in NAMES), truth, tuple(2 * EPS * x.norm() for x in truth))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS if CUDA else [torch.float16], ids=str)
@pytest.mark.parametrize(("alpha", "size"), [(1.5, 0.05), (1.5, 0.2), (1.65, 0.02)])
@pytest.mark.parametrize("single_keys", [False, True])
def test_many_keys_of_nearly_even_weights(
    alpha: float, size: float, dtype: torch.dtype, single_keys: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their scores lie within hundredths of the threshold, where a step of 0.05 is no small one. Queries agree, so that
    tiles of them have few keys with weight."""
    monkeypatch.setattr(kernels.alpha_entmax.results, "SHORTEST_KEY_LIST", 0 if single_keys else 10**6)
    q, k, v, weight = draw_qkv(1, 1, 64, 32768 if CUDA else 4096, dtype=dtype)
    agreeing = (q.detach()[:, :, :1] + 0.01 * q.detach()) * size
    inputs = (agreeing.requires_grad_(), k, v, weight)
    alphas = per_head(alpha, 1)
    truth = compute(inputs, alphas, "reference", torch.float64)
    oracle = attention_oracle(*inputs, alphas)
    ours = compute(inputs, alphas, "triton")
    assert_errors(ours, tuple(oracle[x] for x in NAMES), truth, tuple(2 * EPS * x.norm() for x in truth))


@pytest.mark.parametrize("size", [1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("alphas", [1.5, 2.0, [1.05, 1.1, 1.25, 1.5, 1.75, 2.0]], ids=str)
def test_thresholds(alphas, dtype: torch.dtype, size: float) -> None:
    """Of training's path, within max(1e-5, 4 units in the last place of the largest |z|) of a float64 bisection."""
    heads, n_tokens = (6, 1111) if CUDA else (6 if isinstance(alphas, list) else 2, 140)
    q, k, v, _ = draw_qkv(heads, heads, n_tokens, n_tokens, dtype=dtype)
    q, k, v = (q * size).detach(), k.detach(), v.detach()
    alpha = per_head(alphas, heads).detach()
    power = power_of(alphas if isinstance(alphas, float) else alpha)
    tau = operators(q.requires_grad_(), k, v, alpha, power=power, gradient=True)[0].tau
    q = q.detach()
    hidden = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=DEVICE).triu(1)
    wide = alpha.double()[:, None, None]
    z = (wide - 1) * (q.double() @ k.double().mT * 0.25)
    top = z.masked_fill(hidden, -torch.inf).amax(-1, keepdim=True)
    expected = _bisect_threshold((z - top).masked_fill(hidden, -torch.inf), wide) + top
    ulp = 2.0 ** (math.floor(math.log2(float(z.masked_fill(hidden, 0).abs().max()))) - 23)
    assert (tau.double() - expected[..., 0]).abs().max() <= max(1e-5, 4 * ulp)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inference_equals_training(dtype: torch.dtype) -> None:
    """To the bit. Counting changes the last steps: both within 2x of the oracle's error, so 4x of each other."""
    q, k, v, weight = draw_qkv(4, 2, 130, 130, dtype=dtype)
    alpha, slopes = per_head(MIXED).detach(), torch.tensor(SLOPES, device=DEVICE)
    options = dict(alpha=alpha, alibi_slopes=slopes)
    truth = entmax_attention(*(x.detach().double() for x in (q, k, v)), backend="reference", **options)
    error = (attention_oracle(q, k, v, weight, alpha, None, slopes)["out"].double() - truth).norm()
    rounding_of_results = 2 * EPS * truth.norm()
    training = entmax_attention(q, k, v, backend="triton", **options).detach()
    with torch.no_grad():
        inference = entmax_attention(q, k, v, backend="triton", **options)
        counted, _ = entmax_attention(q, k, v, backend="triton", return_stats=True, **options)
    assert torch.equal(inference, training)
    for out in (training, counted):
        assert (out.double() - truth).norm() <= 2 * error + rounding_of_results
    assert (counted.double() - training.double()).norm() <= 4 * error + 2 * rounding_of_results
