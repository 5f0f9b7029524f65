"""Second derivatives are right or refused, by every path; so are forward mode and torch.func's transforms."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from kernels import block_sparse_softmax_attention, entmax, entmax_attention
from tests.kernels.helpers import DEVICE, draw, needs_triton, operators, per_head

Function = Callable[[Tensor], Tensor]
KEYS = draw(1, 2, 5, 16, seed=1), draw(1, 2, 5, 16, seed=2)


def attend(backend: str) -> Function:
    return lambda q: entmax_attention(q, *KEYS, alpha=1.3, backend=backend)


def registered(q: Tensor) -> Tensor:
    """As under torch.compile."""
    return operators(q, *KEYS, per_head(1.3, 2), gradient=True)[0].out


FIRST_ONLY = [
    pytest.param(attend("triton"), marks=needs_triton, id="triton"),
    pytest.param(registered, marks=needs_triton, id="registered"),
    pytest.param(lambda q: checkpoint(attend("torch"), q, use_reentrant=False), id="checkpointed"),
    pytest.param(attend("torch"), id="torch"),
    pytest.param(lambda q: entmax(q, 1.3, backend="triton"), marks=needs_triton, id="entmax triton"),
]


@pytest.mark.parametrize("function", FIRST_ONLY)
@pytest.mark.parametrize("loss", [torch.sum, lambda out: (out * torch.arange(16.0, device=DEVICE)).sum(), torch.norm])
def test_second_derivatives_are_refused(loss: Function, function: Function) -> None:
    """Also where the incoming gradient is a constant, and beside terms that have a second derivative."""
    q = draw(1, 2, 5, 16).requires_grad_()
    with pytest.raises(RuntimeError, match="differentiable once by this backend"):
        (gradient,) = torch.autograd.grad(loss(function(q)) + (q**3).sum(), q, create_graph=True)
        torch.autograd.grad((gradient**2).sum(), q)


@pytest.mark.parametrize("function", [attend("torch"), pytest.param(attend("triton"), marks=needs_triton)])
def test_first_derivatives_may_keep_their_graph(function: Function) -> None:
    q = draw(1, 2, 5, 16).requires_grad_()
    plain, kept = (torch.autograd.grad(function(q).norm(), q, create_graph=keep)[0] for keep in (False, True))
    assert torch.equal(plain, kept)


@pytest.mark.parametrize("alpha", [1.1, 1.5, 1.8, 1.95])
def test_second_derivatives_of_the_reference(alpha: float) -> None:
    q, k, v = (draw(1, n, 4, 3, seed=i, dtype=torch.float64).requires_grad_() for i, n in enumerate((2, 1, 1)))
    alphas = torch.tensor([alpha, 1.4], dtype=torch.float64, device=DEVICE, requires_grad=True)

    def attention(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor) -> Tensor:
        return entmax_attention(q, k, v, alpha=alpha, backend="reference")

    torch.autograd.gradgradcheck(attention, (q, k, v, alphas), eps=1e-7, atol=1e-4, fast_mode=True)
    x = draw(3, 6, seed=5, dtype=torch.float64).requires_grad_()
    torch.autograd.gradgradcheck(
        lambda x, a: entmax(x, a, backend="torch"), (x, alphas[0]), eps=1e-7, atol=1e-4, fast_mode=True
    )


SQUARE = draw(1, 2, 5, 16, seed=3)
TRANSFORMS: dict[str, Callable[[Function], object]] = {
    "vmap": lambda f: torch.vmap(f)(torch.stack([SQUARE, SQUARE])),
    "grad": lambda f: torch.func.grad(lambda q: f(q).sum())(SQUARE),
    "jvp": lambda f: torch.func.jvp(f, (SQUARE,), (SQUARE,)),
}


def blocks(q: Tensor) -> Tensor:
    return block_sparse_softmax_attention(q, *KEYS, backend="triton")


REFUSING = [x for x in FIRST_ONLY if x.id in ("triton", "torch", "entmax triton")]


@pytest.mark.parametrize("function", [*REFUSING, pytest.param(blocks, marks=needs_triton, id="block-sparse")])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_are_refused(transform: Callable[[Function], object], function: Function) -> None:
    message = "torch.func transforms: take backend='(reference|torch)'|no backward pass"
    with pytest.raises((NotImplementedError, RuntimeError), match=message):
        transform(function)


@pytest.mark.parametrize("function", [attend("torch"), pytest.param(attend("triton"), marks=needs_triton)])
def test_forward_mode_is_refused(function: Function) -> None:
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
        function(forward_ad.make_dual(SQUARE, SQUARE))


def test_transforms_of_the_reference() -> None:
    """Against central differences and a loop."""
    x, *keys = (y.double() for y in (SQUARE, *KEYS))

    def f(q: Tensor) -> Tensor:
        return entmax_attention(q, *keys, alpha=1.3, backend="reference")

    _, tangent = torch.func.jvp(f, (x,), (x,))
    torch.testing.assert_close(tangent, (f(x * (1 + 1e-6)) - f(x * (1 - 1e-6))) / 2e-6, atol=1e-6, rtol=1e-6)
    batch = torch.stack([x, 2 * x])
    torch.testing.assert_close(torch.vmap(f)(batch), torch.stack([f(y) for y in batch]))
