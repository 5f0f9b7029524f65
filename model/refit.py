"""A layer's projection of attention's outputs, fitted anew after the outputs have changed."""

from dataclasses import dataclass
from math import inf, isfinite, nan

import torch
from torch import Tensor

# penalties, as shares of the outputs' mean square, that are compared; with the last one all stays as it is
RIDGES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, inf)
# share of the largest gain that suffices: weaker penalties gain the rest on this text and lose more on other text
GAINED = 0.9


@dataclass(frozen=True)
class Refit:
    """weight: (C, H D), the new projection. error_before, error: of what the old and the new one make of the changed
    outputs, squared differences over all tokens relative to the squares of what is wanted, each half of the tokens
    under what was fitted to the other. ridge: the penalty that was chosen."""

    weight: Tensor
    error_before: float
    error: float
    ridge: float


def refit_projection(outputs: Tensor, wanted: Tensor, weight: Tensor) -> Refit:
    """Linear least squares, as layers are reconstructed after pruning (arXiv:1707.06168, section 3.1): the projection
    with which changed outputs come closest to what `weight` makes of the wanted ones. What keeps it near that is the
    largest of RIDGES that leaves GAINED of what any of them gains on each half of the tokens by a fit to the other.

    Args:
        outputs, wanted: (B, H, T, D), of the same tokens, at least two.
        weight: (C, H D); it stays where they are not finite.
    """
    weight = weight.detach().double()
    rows, gap = _rows(outputs), _rows(wanted)
    size = _squares(gap @ weight.T)
    gap = gap - rows
    halves = list(zip(rows.tensor_split(2), gap.tensor_split(2), strict=True))
    products = [(part.T @ part, part.T @ missing) for part, missing in halves]

    def held_out(ridge: float) -> float:
        changes = [_change(*product, ridge) for product in reversed(products)]
        left = ((missing - part @ change) @ weight.T for (part, missing), change in zip(halves, changes, strict=True))
        return sum(_squares(one) for one in left)

    errors = {ridge: held_out(ridge) for ridge in RIDGES}
    if not all(map(isfinite, errors.values())):
        return Refit(weight.float().cpu(), nan, nan, inf)
    enough = errors[inf] - GAINED * (errors[inf] - min(errors.values()))
    best = max(ridge for ridge, error in errors.items() if error <= enough)
    (gram, cross), (more_gram, more_cross) = products
    change = _change(gram + more_gram, cross + more_cross, best)
    new = weight + weight @ change.T
    size = max(size, torch.finfo(torch.float64).tiny)
    return Refit(new.float().cpu(), errors[inf] / size, errors[best] / size, best)


def _change(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """(H D, H D): what is added to outputs, as their product with it."""
    if ridge == inf:
        return torch.zeros_like(cross)
    penalty = (ridge * gram.diagonal().mean()).clamp(min=torch.finfo(gram.dtype).tiny)
    return torch.linalg.solve(gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), cross)


def _rows(x: Tensor) -> Tensor:
    """(B, H, T, D) -> float64 (B T, H D)."""
    return x.transpose(1, 2).flatten(2).flatten(0, 1).double()


def _squares(x: Tensor) -> float:
    return float(x.square().sum())
