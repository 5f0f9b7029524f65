"""The row-wise op: the reference against independent implementations, the Triton kernels against the reference."""

from typing import Any

import entmax as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels.alpha_entmax.rowwise
from kernels import entmax
from kernels.alpha_entmax.reference import entmax_reference
from kernels.alpha_entmax.threshold import power_of
from kernels.common.backends import INTERPRETED

ALPHAS = (1.01, 1.05, 1.1, 1.25, 1.5, 1.75, 1.999, 2.0)
TRITON_ALPHAS = (1.05, 1.3, 1.5, 1.75, 1.999, 2.0)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps
BACKENDS = [
    "torch",
    pytest.param("triton", marks=pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs CUDA")),
]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # log2(0) in NumPy
needs_triton = BACKENDS[1].marks[0]


def scores(*shape: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * scale


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    """Rows of more than 32 scores span several blocks."""
    monkeypatch.setattr(kernels.alpha_entmax.rowwise, "MAX_BLOCK", 32)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("scale", [0.01, 3.0, 300.0])
def test_agrees_with_bisection_package(alpha: float, scale: float) -> None:
    x = scores(16, 111, scale=scale)
    torch.testing.assert_close(entmax(x, alpha), oracle.entmax_bisect(x, alpha, n_iter=200), atol=1e-12, rtol=0)


@pytest.mark.parametrize("alpha", (1.05, 1.25, 1.5, 1.75, 1.999))
def test_gradients_agree_with_bisection_package(alpha: float) -> None:
    weight = scores(8, 33)
    gradients = []
    for function in (entmax, lambda x, a: oracle.entmax_bisect(x, a, n_iter=200)):
        x, a = (
            scores(8, 33).requires_grad_(),
            torch.tensor([[alpha]], dtype=torch.float64).expand(8, 1).clone().requires_grad_(),
        )
        gradients.append(torch.autograd.grad((function(x, a) * weight).sum(), (x, a)))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-9)


def test_two_is_sparsemax_and_one_is_the_limit_softmax() -> None:
    x = scores(16, 50)
    torch.testing.assert_close(entmax(x, 2.0), oracle.sparsemax(x), atol=1e-14, rtol=0)
    distance = [(entmax(x, 1 + step) - x.softmax(-1)).abs().max().item() for step in (1e-2, 1e-3, 1e-4)]
    assert distance[0] > 5 * distance[1] > 25 * distance[2]  # linear in alpha - 1
    assert distance[2] < 2e-4


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradcheck(alpha: float) -> None:
    x = scores(3, 7).requires_grad_()
    a = torch.tensor(
        alpha - 0.005 if alpha == 2 else alpha, dtype=torch.float64, requires_grad=True
    )  # 2 is the domain's edge
    torch.autograd.gradcheck(entmax, (x, a), eps=1e-7, atol=1e-5)


@settings(max_examples=60)
@given(st.integers(1, 40), st.floats(1.01, 2.0), st.floats(-50, 50), st.integers(0, 2**31))
def test_rows_sum_to_one_and_shifts_change_nothing(n: int, alpha: float, shift: float, seed: int) -> None:
    x = torch.randn(4, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 4
    p = entmax(x, alpha)
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(4, dtype=torch.float64), atol=1e-11, rtol=0)
    torch.testing.assert_close(entmax(x + shift, alpha), p, atol=1e-10, rtol=0)


def assert_as_accurate(
    name: str,
    ours: torch.Tensor,
    theirs: torch.Tensor,
    true: torch.Tensor,
    factor: float,
    alpha: float,
    size: torch.Tensor | None = None,
) -> None:
    """Error of ours, each row by itself, at most `factor` times that of theirs (which rows of few scores can spare it)
    plus roundings relative to `size` (of each row; its norm): float32's, that of log2 on the GPU (2 ** -22) times the
    exponent beta - 1, and that of the result, as 16 bits are computed in float32."""
    assert ours.shape == true.shape and ours.isfinite().all(), name
    rounding = 8 * EPS + (1 / (alpha - 1) - 1) * 2**-22 + torch.finfo(ours.dtype).eps * 0.5
    mine, plain = ((y.double() - true).norm(dim=-1) for y in (ours, theirs))
    size = true.norm(dim=-1) if size is None else size
    excess = mine - factor * plain - rounding * size
    assert (excess <= 0).all(), f"{name}: {mine.tolist()} where the reference has {plain.tolist()} of {size.tolist()}"


def hard_rows(n: int) -> torch.Tensor:
    """float64 (8, n): Gaussian, wide, narrow, huge, equal, tied, one above many equal, geometric."""
    one = torch.zeros(n, dtype=torch.float64)
    one[n // 2] = 0.9
    rows = [*scores(1, n), *scores(1, n, scale=30.0), *scores(1, n, scale=0.01), *scores(1, n, scale=1e4)]
    rows += [torch.full_like(one, 0.3), scores(1, n)[0].round(), one, -(2.0 ** -torch.arange(n).clamp(max=60))]
    return torch.stack([row.double() for row in rows])


@needs_triton
@pytest.mark.parametrize("alpha", TRITON_ALPHAS)
@pytest.mark.parametrize(
    ("dtype", "n"),
    [*((torch.float32, n) for n in (1, 2, 33, 111, 512, 9001)), (torch.bfloat16, 111), (torch.float16, 9001)],
    ids=str,
)
def test_triton_output_is_as_accurate_as_the_reference(dtype: torch.dtype, n: int, alpha: float) -> None:
    x = hard_rows(n).to(dtype)
    true = oracle.entmax_bisect(x.double(), alpha, n_iter=100) if n <= 111 else entmax_reference(x.double(), alpha)
    ours = entmax(x.to(DEVICE), alpha, backend="triton").cpu()
    assert ours.dtype == dtype and (ours >= 0).all()
    assert_as_accurate("p", ours, entmax_reference(x, alpha), true, 2, alpha)
    if dtype == torch.float32:
        torch.testing.assert_close(ours.double().sum(-1), torch.ones(8, dtype=torch.float64), atol=2e-6, rtol=0)


@needs_triton
def test_rows_of_many_blocks_equal_rows_in_registers(small_blocks) -> None:
    for n in (31, 33, 64, 500):
        for alpha in (1.1, 1.5, 2.0):
            x = hard_rows(n).float()
            ours = entmax(x.to(DEVICE), alpha, backend="triton").cpu()
            assert_as_accurate("p", ours, entmax_reference(x, alpha), entmax_reference(x.double(), alpha), 2, alpha)


def gradients(function, x: torch.Tensor, alpha: torch.Tensor, weight: torch.Tensor, **options) -> Any:
    x, alpha = x.detach().requires_grad_(), alpha.detach().requires_grad_()
    return torch.autograd.grad(function(x, alpha, **options), (x, alpha), weight)


def gradient_sizes(x: torch.Tensor, alpha: float, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What each row's dx and dalpha are rounded relative to: their terms, which may cancel."""
    p = entmax_reference(x, alpha)
    u, w = p ** (alpha - 1), torch.where(p > 0, p, 1) ** (2 - alpha) * (p > 0)
    delta = (w * g).sum(-1, keepdim=True) / w.sum(-1, keepdim=True)
    log_size = u * (1 - torch.where(p > 0, u, 1).log())
    log_size = (log_size - (w * log_size).sum(-1, keepdim=True) / w.sum(-1, keepdim=True)).abs() + log_size - u
    dalpha = (w * (g - delta).abs() * log_size).sum(-1) / (alpha - 1) ** 2
    return (w * (g.abs() + delta.abs())).norm(dim=-1), dalpha


@needs_triton
@pytest.mark.parametrize("alpha", [1.05, 1.3, 1.5, 1.75, 1.999])
@pytest.mark.parametrize(
    ("dtype", "blocks"),
    [(torch.float32, "one"), (torch.float32, "many"), (torch.bfloat16, "one"), (torch.float16, "many")],
    ids=str,
)
def test_triton_gradients_are_as_accurate_as_the_reference(
    dtype: torch.dtype, alpha: float, blocks: str, request
) -> None:
    if blocks == "many":
        request.getfixturevalue("small_blocks")
    for n in (1, 33, 111):
        x, weight = hard_rows(n).to(dtype), scores(8, n + 1)[:, :n].to(dtype)
        a = torch.full((8, 1), alpha)
        true = gradients(entmax_reference, x.double(), a.double(), weight.double())
        plain = gradients(entmax_reference, x, a, weight)
        ours = gradients(
            entmax, x.to(DEVICE), a.to(DEVICE), weight.to(DEVICE), backend="triton"
        )  # fmt: skip
        sizes = gradient_sizes(x.double(), alpha, weight.double())
        for i, name in enumerate(("dx", "dalpha")):
            assert_as_accurate(f"{name} {n}", ours[i].cpu(), plain[i], true[i], 3, alpha, sizes[i])


@needs_triton
@pytest.mark.parametrize("shape", [(1,), (8, 1), (3, 1, 1), (1, 5, 1), (3, 5, 1), ()], ids=str)
def test_alpha_broadcasts_with_its_gradient(shape: tuple[int, ...]) -> None:
    x, weight = scores(3, 5, 17) if shape != (8, 1) else scores(8, 17), scores(3, 5, 17)
    weight = weight if shape != (8, 1) else scores(8, 17, scale=1.0)
    alpha = 1.1 + 0.85 * torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    true = gradients(entmax_reference, x, alpha, weight)
    ours = gradients(
        entmax, x.float().to(DEVICE), alpha.float().to(DEVICE), weight.float().to(DEVICE), backend="triton"
    )
    for mine, exact in zip(ours, true, strict=True):
        assert mine.shape == exact.shape and mine.dtype == torch.float32
        torch.testing.assert_close(mine.cpu().double(), exact, atol=2e-5 * exact.abs().max().item(), rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dims_and_strides(backend: str) -> None:
    x = scores(5, 6, 7).float().to(DEVICE)
    weight = scores(5, 6, 7, scale=1.0).float().to(DEVICE)
    for view in (x, x.transpose(0, 2), x[:, ::2, 1:], x[..., :1].expand(5, 6, 4), x[0, 0]):
        for dim in range(-view.dim(), view.dim()):
            y = view.detach().requires_grad_()
            p = entmax(y, 1.3, dim, backend)
            expected = entmax_reference(view.double(), 1.3, dim)
            torch.testing.assert_close(p.double(), expected, atol=1e-6, rtol=0)
            w = weight.flatten()[: y.numel()].view(y.shape).double()
            z = view.detach().double().requires_grad_()
            (ours,) = torch.autograd.grad(p, y, w.float())
            (theirs,) = torch.autograd.grad(entmax_reference(z, 1.3, dim), z, w)
            torch.testing.assert_close(ours.double(), theirs, atol=5e-6, rtol=0)
    scalar = torch.tensor(3.0, device=DEVICE, requires_grad=True)
    assert entmax(scalar, backend=backend).shape == () and entmax(scalar, backend=backend) == 1


@pytest.mark.parametrize("alpha", [1.05, 1.5, 2.0, torch.tensor(1.3)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_entries_empty_rows_and_nan(backend: str, alpha, request) -> None:
    for n in (7, 70):
        x = scores(6, n).float()
        x[0, 3:] = -torch.inf
        x[1] = -torch.inf
        x[2, 1] = torch.nan
        x[3, 2] = torch.inf
        x[4, :-1] = -torch.inf
        x = x.to(DEVICE).requires_grad_()
        p = entmax(x, alpha, backend=backend)
        assert (p[0, 3:] == 0).all() and (p[1] == 0).all() and (p[4, :-1] == 0).all() and p[4, -1] == 1
        assert p[2:4].isnan().all() and not p[[0, 1, 4, 5]].isnan().any()
        torch.testing.assert_close(p[0, :3], entmax(x[0, :3], alpha, backend=backend), atol=1e-6, rtol=0)
        (dx,) = torch.autograd.grad(p, x, torch.ones_like(p))
        assert dx[[0, 1, 4, 5]].abs().max() < 1e-5 and dx[2:4].isnan().all()
        if n == 7:
            request.getfixturevalue("small_blocks")  # the next length spans several


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "dim"), [((0,), 0), ((0, 4), 1), ((4, 0), 1), ((3, 0, 5), 2), ((3, 0, 5), 1)])
def test_no_elements(shape: tuple[int, ...], dim: int, backend: str) -> None:
    x = torch.zeros(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    alpha = torch.tensor(1.5, device=DEVICE, requires_grad=True)
    p = entmax(x, alpha, dim, backend)
    assert p.shape == x.shape and p.dtype == x.dtype
    dx, dalpha = torch.autograd.grad(p.sum(), (x, alpha))
    assert dx.shape == x.shape and dalpha == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_sixteen_bits_are_computed_in_float32(backend: str) -> None:
    """alpha = 1.05 in bfloat16 would be 1.047, off by 6 % where it matters."""
    x = scores(8, 50).bfloat16().to(DEVICE)
    ours = entmax(x, 1.05, backend=backend)
    expected = entmax_reference(x.float(), 1.05).bfloat16()
    torch.testing.assert_close(ours, expected, atol=1e-30, rtol=2**-7)


@needs_triton
def test_registered_operator_is_sound() -> None:
    x = scores(5, 33).float().to(DEVICE)
    for alpha in (torch.tensor([1.3], device=DEVICE), torch.linspace(1.1, 2, 5, device=DEVICE)):
        for grad in (False, True):
            arguments = (x.clone().requires_grad_(grad), alpha.clone().requires_grad_(grad), power_of(alpha))
            torch.library.opcheck(kernels.alpha_entmax.rowwise.entmax_rows, arguments)
    torch.library.opcheck(
        kernels.alpha_entmax.rowwise.entmax_rows, (x.t(), torch.tensor([1.5], device=DEVICE), "linear")
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend: str) -> None:
    x = scores(3, 4, 9).float().to(DEVICE).transpose(0, 1).requires_grad_()
    alpha = torch.linspace(1.1, 2, 4, device=DEVICE)[:, None, None].requires_grad_()
    weight = scores(4, 3, 9, scale=1.0).float().to(DEVICE)

    def attend(x, alpha):
        return entmax(x, alpha, 1 - 3, backend) + entmax(x, 1.5, backend=backend)

    per_slice = alpha[:, :1]
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(x, per_slice), (x, alpha), weight, retain_graph=True) for f in (attend, compiled)]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_lengths_share_their_kernels() -> None:
    """By power of two, and by whether 16 divides them."""

    def kernels_after(*lengths: int) -> int:
        for n in lengths:
            for rows in (1, 16, 33):
                entmax(scores(rows, n).float().to(DEVICE), 1.5, backend="triton")
        caches = kernels.alpha_entmax.rowwise.entmax_rows_forward.device_caches
        return sum(len(cache[0]) for cache in caches.values())

    before = kernels_after(9001, 9008, 33, 48)
    assert kernels_after(9007, 20001, 70000, 20000, 41, 63, 64) == before


@pytest.mark.parametrize("alpha", [1.0, 0.5, 2.1, float("nan"), 1 + 1e-20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_alpha_outside_is_named(alpha: float, backend: str) -> None:
    x = scores(2, 3).float().to(DEVICE)
    with pytest.raises(ValueError, match=r"alpha must lie in \(1, 2\], got " + str(alpha)):
        entmax(x, alpha, backend=backend)
    with pytest.raises(ValueError, match=r"alpha must lie in \(1, 2\], got \["):
        entmax(x, torch.tensor([[1.5], [alpha]]), backend=backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(3, dtype=torch.int64)), "x must be one of .*got torch.int64"),
        (dict(dim=2), r"dim must be one of the 2 of x \(2, 3\), got 2"),
        (dict(alpha=torch.full((2, 3), 1.5)), r"alpha must be a number or broadcast to \(2, 1\), got shape \(2, 3\)"),
        (dict(alpha=torch.full((1, 2, 1), 1.5)), r"got shape \(1, 2, 1\)"),
        (dict(alpha=torch.full((3, 1), 1.5)), r"broadcast to \(2, 1\), got shape \(3, 1\)"),
        (dict(backend="cuda"), "backend must be one of auto, triton, torch, got 'cuda'"),
        (dict(backend="triton", x=torch.zeros(2, 3, dtype=torch.float64)), "got torch.float64; use backend='torch'"),
    ],
)
def test_errors_name_the_value(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        entmax(**{**dict(x=torch.zeros(2, 3)), **change})
