"""entmax_attention: reference against independent definitions, fast paths against the reference, memory, errors."""

import subprocess
import sys
from pathlib import Path

import entmax as oracle
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import kernels.alpha_entmax.blockwise
from kernels import entmax_attention
from tests.kernels.conftest import ALPHAS, CASES, DOCUMENTS, HEADS, SLOPES, Case
from tests.kernels.helpers import plain_attention

ROOT = Path(__file__).parents[3]
FAST_BACKENDS = ["torch"]  # that take float64; test_triton_accuracy.py has the Triton kernels
case_parameters = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def outputs_and_gradients(case: Case, dtype: torch.dtype, alpha, backend: str, cast: torch.dtype | None = None):
    """Output, dq, dk, dv, dalpha of one case; `cast` computes in another dtype on the same (rounded) inputs."""
    q, k, v, weight = (x.detach().to(cast or dtype).requires_grad_() for x in case.tensors(dtype))
    alpha = torch.as_tensor(alpha, dtype=torch.float32)  # one value for all dtypes
    alpha = alpha.to(torch.float64 if (cast or dtype) == torch.float64 else torch.float32)
    alpha = alpha.expand(HEADS).clone().requires_grad_()
    if backend == "plain":
        out = plain_attention(q, k, v, alpha, **case.options)
    else:
        out = entmax_attention(q, k, v, alpha=alpha, backend=backend, **case.options)
    return out.detach(), *torch.autograd.grad(out, (q, k, v, alpha), weight)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_autocast_changes_nothing(backend: str, dtype: torch.dtype, scale: float) -> None:
    """With rounded scores in forward alone, backward would find scores beyond forward's thresholds: at 1e4 gradients
    of 1e11."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, weight = (torch.randn(1, 2, 150, 16, generator=generator).to(dtype) for _ in range(4))
    found = []
    for cast in (False, True):
        inputs = [(q * scale).requires_grad_(), *(x.clone().requires_grad_() for x in (k, v))]
        alpha = torch.tensor([1.15, 1.5], requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            out = entmax_attention(*inputs, alpha=alpha, backend=backend)
        found.append((out.detach(), *torch.autograd.grad(out, (*inputs, alpha), weight)))
    assert all(torch.equal(plain, cast) for plain, cast in zip(*found, strict=True))
    assert all(torch.isfinite(x).all() for x in found[0])


@case_parameters
def test_reference_is_entmax_of_visible_scores(case: Case) -> None:
    """Against a loop over single queries and the entmax package, with visibility written out by its definition."""
    q, k, v, _ = (x.detach() for x in case.tensors(torch.float64))
    ours = entmax_attention(q, k, v, alpha=1.4, backend="reference", **case.options)
    options = case.options
    slopes = options.get("alibi_slopes", torch.zeros(HEADS))
    kv_lens = options.get("kv_lens", torch.full((case.batch,), case.n_keys)).tolist()
    documents = options.get("cu_seqlens", torch.tensor([0, case.n_keys])).tolist()
    for b in range(case.batch):
        for i in range(0, case.n_queries, 3):
            position = kv_lens[b] - case.n_queries + i
            start = max((s for s in documents[:-1] if s <= max(position, 0)), default=0)
            stop = min(e for e in documents[1:] if e > max(position, 0)) if position < documents[-1] else documents[-1]
            stop = min(stop, kv_lens[b])
            keys = [
                j
                for j in range(start, stop)
                if not (options.get("causal", True) and j > position)
                and not ("window" in options and j <= position - options["window"])
            ]
            for h in range(HEADS):
                if not keys:
                    assert (ours[b, h, i] == 0).all()
                    continue
                g = h // (HEADS // k.shape[1])
                score = k[b, g, keys] @ q[b, h, i] * options.get("scale", q.shape[3] ** -0.5)
                score = score - float(slopes[h]) * (position - torch.tensor(keys, dtype=torch.float64))
                p = oracle.entmax_bisect(score, 1.4, n_iter=100)
                torch.testing.assert_close(ours[b, h, i], p @ v[b, g, keys], atol=1e-10, rtol=0)


def test_reference_gradcheck_alpha_included() -> None:
    case = Case("small", dict(alibi_slopes=torch.tensor(SLOPES)), batch=1, n_queries=5, n_keys=6)
    q, k, v, _ = case.tensors(torch.float64, head_dim=3)
    alpha = torch.tensor([1.1, 1.4, 1.7, 1.95], dtype=torch.float64, requires_grad=True)
    for backend in ("reference", *FAST_BACKENDS):

        def attend(q, k, v, alpha, backend=backend):
            return entmax_attention(q, k, v, alpha=alpha, backend=backend, **case.options)

        torch.autograd.gradcheck(attend, (q, k, v, alpha), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("block_elements", [2**18, 3000], ids=["one block", "many blocks"])
@pytest.mark.parametrize("alpha", ALPHAS, ids=str)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
@case_parameters
def test_float64_equals_reference(case: Case, backend: str, alpha, block_elements: int, monkeypatch) -> None:
    monkeypatch.setitem(kernels.alpha_entmax.blockwise.BLOCK_ELEMENTS, "cpu", block_elements)
    expected = outputs_and_gradients(case, torch.float64, alpha, "reference")
    actual = outputs_and_gradients(case, torch.float64, alpha, backend)
    for name, ours, theirs in zip(("out", "dq", "dk", "dv", "dalpha"), actual, expected, strict=True):
        scale = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(ours, theirs, atol=2e-11 * scale, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("case", [CASES[0], CASES[8], CASES[10]], ids=lambda case: case.name)
def test_error_is_at_most_that_of_plain_pytorch(case: Case, backend: str, dtype: torch.dtype) -> None:
    """Against float64 on the same inputs: output within 2x and gradients within 3x of what the dense path loses in
    that dtype."""
    alpha = [1.1, 1.3, 1.5, 1.9]
    truth = outputs_and_gradients(case, dtype, alpha, "reference", cast=torch.float64)
    plain = outputs_and_gradients(case, dtype, alpha, "plain")
    ours = outputs_and_gradients(case, dtype, alpha, backend)
    for index, (true, theirs, mine) in enumerate(zip(truth, plain, ours, strict=True)):
        allowed = (2 if index == 0 else 3) * (theirs.double() - true).norm()
        assert (mine.double() - true).norm() <= allowed + 2 * torch.finfo(torch.float32).eps * true.norm(), index


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_sixteen_bits_are_computed_in_float32(backend: str, dtype: torch.dtype) -> None:
    """Large scores, where rounding them to 16 bits would choose other keys: only the result is rounded."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 32, generator=generator).mul(4).to(dtype) for _ in range(3))
    out = entmax_attention(q, k, v, backend=backend)
    exact = entmax_attention(*(x.double() for x in (q, k, v)), backend="reference")
    allowed = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-4 * v.abs().max().item()
    assert ((out.double() - exact).abs() <= allowed).all()


EMPTY = [(1, 2, 0, 5), (1, 2, 5, 0), (1, 2, 0, 0), (0, 2, 5, 5), (1, 0, 5, 5)]


@pytest.mark.parametrize("sizes", EMPTY, ids=["no queries", "no keys", "neither", "no rows", "no heads"])
@pytest.mark.parametrize("options", [dict(), dict(causal=False), dict(alibi_slopes=1.0, window=2)], ids=str)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_nothing_to_attend_to(backend: str, options: dict, sizes: tuple[int, ...]) -> None:
    """test_triton.py has the Triton kernels."""
    batch, heads, n_queries, n_keys = sizes
    if "alibi_slopes" in options:
        options = {**options, "alibi_slopes": torch.ones(heads)}
    q, k, v = (torch.ones(batch, h, n, 16).requires_grad_() for h, n in ((heads, n_queries), (2, n_keys), (2, n_keys)))
    alpha = torch.full((heads,), 1.5, requires_grad=True)
    out, stats = entmax_attention(q, k, v, alpha=alpha, backend=backend, return_stats=True, **options)
    assert out.shape == q.shape and out.dtype == q.dtype and (out == 0).all()
    assert stats.support.shape == q.shape[:3] and stats.live_tiles.shape == (batch, heads)
    assert (stats.support == 0).all() and (stats.live_tiles == 0).all() and stats.live_share.isfinite().all()
    for x, gradient in zip((q, k, v, alpha), torch.autograd.grad(out.sum(), (q, k, v, alpha)), strict=True):
        assert gradient.shape == x.shape and (gradient == 0).all()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_documents_without_tokens(backend: str) -> None:
    x = torch.zeros(1, 2, 0, 16)
    documents = torch.zeros(3, dtype=torch.int32)
    assert entmax_attention(x, x, x, cu_seqlens=documents, backend=backend).shape == x.shape


@case_parameters
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_statistics_equal_the_reference(case: Case, backend: str) -> None:
    q, k, v, _ = (x.detach() for x in case.tensors(torch.float64, seed=3))
    _, expected = entmax_attention(q, k, v, alpha=1.5, backend="reference", return_stats=True, **case.options)
    _, actual = entmax_attention(q, k, v, alpha=1.5, backend=backend, return_stats=True, **case.options)
    for name in ("support", "live_tiles", "total_tiles"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert (actual.live_tiles <= actual.total_tiles[:, None]).all()


def test_documents_equal_a_loop_over_documents() -> None:
    case = Case("documents", batch=1)
    q, k, v, _ = (x.detach() for x in case.tensors(torch.float64))
    packed = entmax_attention(q, k, v, alpha=1.3, cu_seqlens=DOCUMENTS)
    for start, stop in zip(DOCUMENTS.tolist(), DOCUMENTS.tolist()[1:], strict=False):
        part = slice(start, stop)
        if stop > start:
            alone = entmax_attention(q[:, :, part], k[:, :, part], v[:, :, part], alpha=1.3)
            torch.testing.assert_close(packed[:, :, part], alone, atol=1e-13, rtol=0)


def test_alpha_near_one_is_softmax_attention() -> None:
    q, k, v, _ = (x.detach() for x in CASES[0].tensors(torch.float64))
    ours = entmax_attention(q, k, v, alpha=1.0001)
    theirs = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert (ours - theirs).abs().max() < 1e-3
    nearer = entmax_attention(q, k, v, alpha=1.00001)
    assert (nearer - theirs).abs().max() < (ours - theirs).abs().max() / 5


def test_strided_inputs() -> None:
    """(B, T, H, D) seen as (B, H, T, D), as projections produce it."""
    q, k, v, _ = (x.detach() for x in CASES[0].tensors(torch.float64))
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(entmax_attention(*strided), entmax_attention(q, k, v), atol=0, rtol=0)


def test_registered_operator_is_sound_and_compiles() -> None:
    q, k, v, _ = Case("small", batch=1, n_queries=9, n_keys=9).tensors(torch.float32)
    alpha = torch.tensor([1.2, 1.4, 1.5, 2.0], requires_grad=True)
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    arguments = (q, k, v, alpha, 0.25, True, cu_seqlens, None, torch.tensor(SLOPES), None, True)
    torch.library.opcheck(kernels.alpha_entmax.blockwise.entmax_attention_blockwise, arguments)

    def attend(q, k, v, alpha):
        return entmax_attention(q, k, v, alpha=alpha, cu_seqlens=cu_seqlens)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(f(q, k, v, alpha).sum(), (q, k, v, alpha)) for f in (attend, compiled)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_memory_stays_linear_in_length() -> None:
    """Dense float32 scores of 4 heads alone would take 256 MiB at 4096 tokens."""
    command = [sys.executable, "-m", "benchmarks.memory", "4096", "--device", "cpu"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert float(printed.split("tokens: ")[1].split(" MiB")[0]) < 64, printed


def _valid() -> dict:
    q, k, v, _ = (x.detach() for x in CASES[0].tensors(torch.float32))
    return dict(q=q, k=k, v=v)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(alpha=1.0), r"alpha must lie in \(1, 2\], got 1.0"),
        (dict(alpha=torch.tensor([1.5, 1.5, 2.5, 1.5])), r"alpha must lie in \(1, 2\], got \[2.5\]"),
        (dict(alpha=torch.full((3,), 1.5)), r"a tensor \(4,\).*got \(3,\)"),
        (dict(k=torch.zeros(2, 3, 111, 16), v=torch.zeros(2, 3, 111, 16)), "multiple of key/value heads, got 4 and 3"),
        (dict(v=torch.zeros(2, 2, 110, 16)), "k and v must be"),
        (dict(q=torch.zeros(2, 4, 111)), r"q must be \(batch, heads, tokens, head dim\), got \(2, 4, 111\)"),
        (dict(k=torch.zeros(2, 2, 111, 16, dtype=torch.float64)), "share one of"),
        (dict(cu_seqlens=torch.tensor([0, 111])), "cu_seqlens must be 1-d int32"),
        (dict(cu_seqlens=torch.tensor([0, 111], dtype=torch.int32)), "needs B = 1"),
        (dict(kv_lens=torch.tensor([5, 112], dtype=torch.int32)), r"0 ... Tk = 111, got \[5, 112\]"),
        (dict(kv_lens=torch.tensor([5], dtype=torch.int32)), r"kv_lens must be \(2,\)"),
        (dict(window=0), "window must be at least 1"),
        (dict(window=5, causal=False), "needs causal=True"),
        (dict(alibi_slopes=torch.ones(3)), r"alibi_slopes must be \(4,\)"),
        (dict(backend="cuda"), "backend must be one of auto, triton, torch, reference, got 'cuda'"),
        (dict(scale=-0.25), "scale must be positive and finite, got -0.25; put a sign into q"),
        (dict(scale=0), "scale must be positive and finite, got 0.0"),
        (dict(scale=float("inf")), "scale must be positive and finite, got inf"),
    ],
)
def test_errors_name_the_value(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        entmax_attention(**{**_valid(), **change})


def test_documents_must_rise_to_the_length() -> None:
    inputs = {name: x[:1] for name, x in _valid().items()}
    for bad in ([0, 50, 40, 111], [1, 111], [0, 100]):
        with pytest.raises(ValueError, match="must rise from 0 to T = 111"):
            entmax_attention(**inputs, cu_seqlens=torch.tensor(bad, dtype=torch.int32))
