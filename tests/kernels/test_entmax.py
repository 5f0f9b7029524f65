"""The row-wise op against independent implementations."""

import entmax as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import entmax

ALPHAS = (1.01, 1.05, 1.1, 1.25, 1.5, 1.75, 1.999, 2.0)


def scores(*shape: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * scale


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


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.floats(1.01, 2.0), st.floats(-50, 50), st.integers(0, 2**31))
def test_rows_sum_to_one_and_shifts_change_nothing(n: int, alpha: float, shift: float, seed: int) -> None:
    x = torch.randn(4, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 4
    p = entmax(x, alpha)
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(4, dtype=torch.float64), atol=1e-11, rtol=0)
    torch.testing.assert_close(entmax(x + shift, alpha), p, atol=1e-10, rtol=0)


def test_dim_masked_entries_and_empty_rows() -> None:
    x = scores(5, 6, 7)
    torch.testing.assert_close(entmax(x, 1.3, dim=1), entmax(x.transpose(1, 2), 1.3).transpose(1, 2))
    x[0, 0, 3:] = -torch.inf
    x[0, 1] = -torch.inf
    p = entmax(x.requires_grad_(), 1.3)
    assert (p[0, 0, 3:] == 0).all() and (p[0, 1] == 0).all()
    p.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("alpha", [1.0, 0.5, 2.1, float("nan")])
def test_alpha_outside_is_named(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha must lie in \(1, 2\]"):
        entmax(scores(2, 3), alpha)
