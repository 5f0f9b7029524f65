"""Quantiles of Student's t and of the beta distribution, from the regularised incomplete beta function."""

import math
from collections.abc import Callable
from functools import lru_cache

TINY = 1e-300


def incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b), the share of a beta(a, b) distribution below x (continued fraction, DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly
        return 1 - incomplete_beta(b, a, 1 - x)
    log_front = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    # modified Lentz: c and d are ratios of successive numerators and denominators
    c, d = 1.0, 1 / _away_from_zero(1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 100_000):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _away_from_zero(1 + term * d)
            c = _away_from_zero(1 + term / c)
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return math.exp(log_front) / a * fraction


def beta_quantile(probability: float, a: float, b: float) -> float:
    return _bisect(lambda x: incomplete_beta(a, b, x), probability)


@lru_cache
def t_quantile(probability: float, degrees: float) -> float:
    """Quantile of Student's t with any positive number of degrees of freedom; probability in (0.5, 1)."""
    # t² / (degrees + t²) is beta(1/2, degrees/2); its complement is searched, which stays exact where t is large
    rest = _bisect(lambda x: incomplete_beta(degrees / 2, 0.5, x), 2 * (1 - probability))
    return math.sqrt(degrees * (1 - rest) / rest)


def _bisect(rising: Callable[[float], float], wanted: float) -> float:
    low, high = 0.0, 1.0
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return high


def _away_from_zero(value: float) -> float:
    return value if abs(value) > TINY else TINY
