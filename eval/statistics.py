"""Intervals: Wilson for shares, bootstrap over documents for ratios of sums."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def map(self, function: Callable[[float], float]) -> "Interval":
        """The same interval on another scale; `function` must be increasing."""
        return Interval(function(self.value), function(self.low), function(self.high))


def wilson(share: float, trials: int) -> Interval:
    """Wilson score interval of a binomial share (Wilson 1927, eq. 4 of Brown, Cai and DasGupta 2001).

    Args:
        share: Observed share of successes in [0, 1]. It need not be a multiple of 1 / trials: the mean of several
            correlated outcomes within each trial is allowed, with the independent trials counted.
        trials: Number of independent trials, at least 1.
    """
    if trials < 1 or not 0 <= share <= 1:
        raise ValueError(f"share {share} of {trials} trials: expected a share in [0, 1] of at least one trial")
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    denominator = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / denominator
    half = z / denominator * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # At a share of 0 or 1 the formula's end is exactly 0 or 1; rounding must not leave it at 1e-17.
    low = 0.0 if share == 0 else max(0.0, centre - half)
    high = 1.0 if share == 1 else min(1.0, centre + half)
    return Interval(share, low, high)


def resample_counts(documents: int, resamples: int, seed: int) -> NDArray[np.int64]:
    """How often each document is drawn in each bootstrap resample.

    Returns:
        int64 (resamples, documents); every row sums to `documents`. The same arguments give the same counts, which is
        what makes differences between models paired.
    """
    if documents < 1:
        raise ValueError("the bootstrap needs at least one document, got 0")
    generator = np.random.default_rng([seed, documents, resamples])
    return generator.multinomial(documents, np.full(documents, 1 / documents), size=resamples)


def bootstrap_ratio(numerators: ArrayLike, denominators: ArrayLike, resamples: int, seed: int) -> Interval:
    """Percentile bootstrap over documents of sum(numerators) / sum(denominators).

    Args:
        numerators: (documents,) for example the loss in nats of each document.
        denominators: (documents,) for example the tokens or bytes of each document; their sum must be positive.
    """
    top, bottom = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    counts = resample_counts(len(top), resamples, seed)
    return _percentiles(top.sum() / bottom.sum(), (counts @ top) / _positive(counts @ bottom))


def bootstrap_paired(
    first: ArrayLike, second: ArrayLike, denominators: ArrayLike, resamples: int, seed: int
) -> tuple[Interval, Interval]:
    """Paired bootstrap of two models over the same documents.

    Args:
        first, second: (documents,) losses of the two models on each document.
        denominators: (documents,) tokens or bytes, the same for both.

    Returns:
        The difference (sum(first) - sum(second)) / sum(denominators) and the ratio sum(first) / sum(second).
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    bottom = np.asarray(denominators, np.float64)
    if not a.shape == b.shape == bottom.shape:
        raise ValueError(f"paired values of shapes {a.shape}, {b.shape}, {bottom.shape}: expected the same documents")
    counts = resample_counts(len(a), resamples, seed)
    drawn_a, drawn_b, drawn_bottom = counts @ a, counts @ b, _positive(counts @ bottom)
    difference = _percentiles((a.sum() - b.sum()) / bottom.sum(), (drawn_a - drawn_b) / drawn_bottom)
    return difference, _percentiles(a.sum() / b.sum(), drawn_a / _positive(drawn_b))


def _positive(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    # A resample that draws only documents without a token in some bin says nothing about that bin.
    return np.where(sums > 0, sums, np.nan)


def _percentiles(value: float, draws: NDArray[np.float64]) -> Interval:
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.nanpercentile(draws, [tail, 100 - tail])
    return Interval(float(value), float(low), float(high))
