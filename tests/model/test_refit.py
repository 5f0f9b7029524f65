"""Projections fitted to changed outputs."""

import math
from math import inf

import pytest
import torch
from torch import Tensor

from model.refit import RIDGES, refit_projection

HEADS, TOKENS, HEAD_DIM, WIDTH = 3, 50, 4, 10
DTYPES = torch.bfloat16, torch.float64


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(x: Tensor) -> Tensor:
    """What a projection reads, token by token."""
    return torch.stack([torch.cat([x[b, h, t] for h in range(x.shape[1])]) for b in range(2) for t in range(TOKENS)])


@pytest.fixture
def wanted() -> Tensor:
    return drawn(2, HEADS, TOKENS, HEAD_DIM, seed=0)


@pytest.fixture
def weight() -> Tensor:
    return drawn(WIDTH, HEADS * HEAD_DIM, seed=1)


def mixed(x: Tensor, mixing: Tensor) -> Tensor:
    """Outputs whose heads and channels are mixed."""
    return (rows(x) @ mixing).view(2, TOKENS, HEADS, HEAD_DIM).transpose(1, 2)


def test_undoes_a_linear_change(wanted: Tensor, weight: Tensor) -> None:
    changed = mixed(wanted, torch.eye(12) + 0.3 * drawn(12, 12, seed=2))
    found = refit_projection(changed, wanted, weight)
    goal, before, after = rows(wanted) @ weight.T, rows(changed) @ weight.T, rows(changed) @ found.weight.T
    assert (before - goal).norm() > 0.3 * goal.norm() and (after - goal).norm() < 0.3 * (before - goal).norm()
    assert found.error < 0.1 * found.error_before
    torch.testing.assert_close(
        torch.tensor(found.error_before), ((before - goal).norm() / goal.norm()).square(), rtol=1e-4, atol=0
    )


def test_is_the_least_squares_solution(wanted: Tensor, weight: Tensor) -> None:
    """With penalties as rows of their own, by torch's solver; errors of each half by the other half's solution."""
    changed = mixed(wanted, torch.eye(12) + 0.3 * drawn(12, 12, seed=2)) + 0.5 * drawn(*wanted.shape, seed=3)
    x, y, w = rows(changed).double(), rows(wanted).double(), weight.double()

    def solved(part: slice, ridge: float) -> Tensor:
        if ridge == inf:
            return w
        penalty = (ridge * x[part].square().sum(0).mean()).sqrt() * torch.eye(12, dtype=torch.float64)
        of_weight = torch.cat([(y - x)[part] @ w.T, torch.zeros(12, WIDTH, dtype=torch.float64)])
        return w + torch.linalg.lstsq(torch.cat([x[part], penalty]), of_weight).solution.T

    halves = slice(0, TOKENS), slice(TOKENS, 2 * TOKENS)
    errors = {
        ridge: sum(
            float((x[part] @ solved(other, ridge).T - y[part] @ w.T).square().sum())
            for part, other in (halves, halves[::-1])
        )
        / float((y @ w.T).square().sum())
        for ridge in RIDGES
    }
    found = refit_projection(changed, wanted, weight)
    enough = errors[inf] - 0.9 * (errors[inf] - min(errors.values()))
    best = max(ridge for ridge in RIDGES if errors[ridge] <= enough)
    assert found.ridge == best != inf and errors[best] < errors[inf]
    assert found.error == pytest.approx(errors[best], rel=1e-5)
    assert found.error_before == pytest.approx(errors[inf], rel=1e-5)
    torch.testing.assert_close(found.weight.double(), solved(slice(None), best), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_fitted_stays(wanted: Tensor, weight: Tensor) -> None:
    """What is missing has nothing to do with the outputs: a fit to one half is worse than none on the other."""
    outputs = drawn(*wanted.shape, seed=4)
    found = refit_projection(outputs, outputs + 0.1 * drawn(*wanted.shape, seed=5), weight)
    assert found.ridge == inf and found.error == found.error_before
    assert torch.equal(found.weight, weight)


def test_outputs_of_zero(wanted: Tensor, weight: Tensor) -> None:
    """As of heads that see nothing."""
    found = refit_projection(torch.zeros_like(wanted), wanted, weight)
    assert torch.equal(found.weight, weight) and found.error == pytest.approx(1)
    nothing = refit_projection(torch.zeros_like(wanted), torch.zeros_like(wanted), weight)
    assert torch.equal(nothing.weight, weight) and nothing.error == 0


def test_fewer_tokens_than_channels(weight: Tensor) -> None:
    wanted = drawn(1, HEADS, 5, HEAD_DIM, seed=6)
    found = refit_projection(wanted * 1.5, wanted, weight)
    assert bool(found.weight.isfinite().all()) and found.error <= found.error_before


def test_outputs_that_are_not_finite(wanted: Tensor, weight: Tensor) -> None:
    outputs = wanted.clone()
    outputs[0, 0, 0, 0] = torch.nan
    found = refit_projection(outputs, wanted, weight)
    assert torch.equal(found.weight, weight) and found.ridge == inf and math.isnan(found.error)


def test_differences_are_not_rounded(wanted: Tensor, weight: Tensor) -> None:
    """In bfloat16 a small difference of large outputs would be."""
    changed = (wanted + 0.004 * drawn(*wanted.shape, seed=7)).bfloat16()
    half, whole = (refit_projection(changed.to(dtype), wanted.bfloat16().to(dtype), weight) for dtype in DTYPES)
    assert half.error_before == pytest.approx(whole.error_before, rel=1e-6)
