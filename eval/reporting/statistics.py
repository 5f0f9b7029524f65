"""95 % confidence intervals. tests/eval/reporting/test_coverage.py simulates how often each one holds the true value.

What is estimated: the value over all documents (or samples) such as those measured. For a ratio of sums that is
E[numerator of a document] / E[denominator of a document]: of loss and tokens, the loss of a token drawn at random from
such text. Tokens of one document are alike, so documents, not tokens, are what the intervals count.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eval.reporting.quantiles import beta_quantile, t_quantile

CONFIDENCE = 0.95
LEAST_UNITS = 5
LEAST_DEGREES = 2.0


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its 95 % confidence interval.

    Args:
        low, high: None where there is no interval: below LEAST_UNITS units, or where one unit has nearly all tokens.
        units: Independent documents or samples that it was estimated from; None where the ends are something else.
    """

    value: float
    low: float | None
    high: float | None
    units: int | None = None

    @property
    def drawn(self) -> tuple[float, float]:
        """The ends for a plot, in which NaN is left out."""
        return (math.nan, math.nan) if self.low is None or self.high is None else (self.low, self.high)

    def map(self, function: Callable[[float], float]) -> "Interval":
        """The same interval on another scale; `function` must be increasing. Without ends where those overflow."""
        value = function(self.value)
        if self.low is None or self.high is None:
            return Interval(value, None, None, self.units)
        try:
            return Interval(value, function(self.low), function(self.high), self.units)
        except OverflowError:
            return Interval(value, None, None, self.units)


def share(mean: float, trials: int) -> Interval:
    """Exact interval of a binomial share (Clopper and Pearson 1934): it holds at every share and number of trials.

    Wilson's, which is shorter, holds on average over shares, but as rarely as 83 % near 0 and 1.

    Args:
        mean: Observed share of successes in [0, 1]. It need not be a multiple of 1 / trials: the mean of values in
            [0, 1], or of several correlated outcomes within each trial, varies less than that of outcomes 0 and 1, so
            that the interval is then too wide.
        trials: Number of independent trials, at least 1.
    """
    if trials < 1 or not 0 <= mean <= 1:
        raise ValueError(f"share {mean} of {trials} trials: expected a share in [0, 1] of at least one trial")
    if trials < LEAST_UNITS:
        return Interval(mean, None, None, trials)
    tail, hits = (1 - CONFIDENCE) / 2, mean * trials
    low = 0.0 if hits <= 0 else beta_quantile(tail, hits, trials - hits + 1)
    high = 1.0 if hits >= trials else beta_quantile(1 - tail, hits + 1, trials - hits)
    return Interval(mean, low, high, trials)


def paired_shares(first: ArrayLike, second: ArrayLike) -> Interval:
    """Difference of the means of two runs on the same samples, values in [0, 1].

    Bonett and Price 2012: half a sample is added to each of the four outcomes, so that runs that agree on all of a few
    samples are not called equal. Their normal quantile is replaced by Student's, with which the interval holds from
    five samples on. Values between 0 and 1 count in part, which makes it too wide, not too narrow.

    Args:
        first, second: (samples,) of the two runs.
    """
    differences = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    count = len(differences)
    value = float(differences.mean())
    if count < LEAST_UNITS:
        return Interval(value, None, None, count)
    middle, variance = _paired_moments(differences)
    half = _t(count - 1) * math.sqrt(variance)
    return Interval(value, max(-1.0, middle - half), min(1.0, middle + half), count)


def _paired_moments(differences: NDArray[np.float64]) -> tuple[float, float]:
    """Bonett and Price's middle and its variance, of differences (samples,) in [-1, 1]."""
    count = len(differences)
    better = (float(np.maximum(differences, 0).sum()) + 1) / (count + 2)
    worse = (float(np.maximum(-differences, 0).sum()) + 1) / (count + 2)
    return better - worse, (better + worse - (better - worse) ** 2) / (count + 2)


def mean_of_shares(tasks: Sequence[ArrayLike]) -> Interval:
    """Mean over tasks of each one's mean, as benchmarks are averaged: every task counts alike, whatever its samples.

    The tasks are those that they are; what varies is their samples. The variances of the tasks add up; each is that of
    a binomial share with one success and one failure more (Agresti and Caffo 2000), so that a task whose few samples
    all fail is not taken for certain. Student's t with Satterthwaite's degrees of freedom, about the plain mean.

    Args:
        tasks: of each task (samples,) values in [0, 1].
    """
    values = [np.asarray(task, np.float64) for task in tasks]
    shares = [(float(one.sum()) + 1) / (len(one) + 2) for one in values]
    variances = [p * (1 - p) / (len(one) + 2) for p, one in zip(shares, values, strict=True)]
    return _mean_over_tasks(values, variances, 0.0)


def mean_of_paired_shares(first: Sequence[ArrayLike], second: Sequence[ArrayLike]) -> Interval:
    """Difference of two runs' means over the same tasks and samples: as `mean_of_shares`, with the variances of
    `paired_shares`.

    Args:
        first, second: of each task (samples,) values in [0, 1] of the two runs.
    """
    values = [np.asarray(a, np.float64) - np.asarray(b, np.float64) for a, b in zip(first, second, strict=True)]
    return _mean_over_tasks(values, [_paired_moments(one)[1] for one in values], -1.0)


def _mean_over_tasks(values: Sequence[NDArray[np.float64]], variances: Sequence[float], least: float) -> Interval:
    """variances: of each task's mean. least: of any value; the most is 1."""
    mean, samples = float(np.mean([one.mean() for one in values])), sum(len(one) for one in values)
    if min(len(one) for one in values) < LEAST_UNITS:
        return Interval(mean, None, None, samples)
    parts = sum(v**2 / (len(one) - 1) for v, one in zip(variances, values, strict=True))
    half = _t(sum(variances) ** 2 / parts) * math.sqrt(sum(variances)) / len(values)
    return Interval(mean, max(least, mean - half), min(1.0, mean + half), samples)


def ratio_of_sums(numerators: ArrayLike, denominators: ArrayLike) -> Interval:
    """sum(numerators) / sum(denominators) over documents: jackknife with Student's t, on logs where all is positive.

    The variance is the jackknife's, which allows for documents of different sizes. Its degrees of freedom are those of
    Satterthwaite for these sizes (as Bell and McCaffrey 2002): documents - 1 where all are alike, fewer where a few of
    them have most of the tokens. Logs, as losses are skewed to the right.

    Args:
        numerators: (documents,) for example the loss in nats of each document.
        denominators: (documents,) for example the tokens or bytes of each document; their sum must be positive.
            Documents of size 0 say nothing and are not counted.
    """
    return _jackknife(numerators, denominators, logs=True)


def paired_sums(first: ArrayLike, second: ArrayLike, denominators: ArrayLike) -> Interval:
    """(sum(first) - sum(second)) / sum(denominators), two runs over the same documents; as `ratio_of_sums`, no logs."""
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if not a.shape == b.shape == np.shape(denominators):
        shapes = f"{a.shape}, {b.shape}, {np.shape(denominators)}"
        raise ValueError(f"paired values of shapes {shapes}: expected the same documents")
    return _jackknife(a - b, denominators, logs=False)


def _jackknife(numerators: ArrayLike, denominators: ArrayLike, logs: bool) -> Interval:
    top, bottom = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    value = float(top.sum() / bottom.sum())
    top, bottom = top[bottom > 0], bottom[bottom > 0]
    count = len(top)
    if count < LEAST_UNITS:
        return Interval(value, None, None, count)
    degrees = _degrees_of_freedom(bottom / bottom.sum())
    if degrees < LEAST_DEGREES:
        return Interval(value, None, None, count)
    without = (top.sum() - top) / (bottom.sum() - bottom)
    logs = logs and bool((top >= 0).all()) and bool((without > 0).all())
    middle, without = (math.log(value), np.log(without)) if logs else (value, without)
    half = _t(degrees) * math.sqrt((count - 1) / count * float(((without - without.mean()) ** 2).sum()))
    scale = math.exp if logs else float
    return Interval(value, scale(middle - half), scale(middle + half), count)


def _degrees_of_freedom(weights: NDArray[np.float64]) -> float:
    """Degrees of freedom of the variance sum(c_i (r_i - R)²), c_i = (w_i / (1 - w_i))², for rates r_i that vary alike
    in all documents.

    2 E[V]² / Var[V] = tr(CG)² / tr(CGCG) with the residuals' covariance G = I - 1w' - w1' + s11', s = sum(w²); sums
    over pairs are written out as products of sums.
    """
    w = weights
    c = (w / (1 - w)) ** 2
    s = float((w**2).sum())
    zeroth, first, second = float(c.sum()), float((c * w).sum()), float((c * w**2).sum())
    trace = float((c * (1 - 2 * w + s)).sum())
    pairs = (s * zeroth) ** 2 + 2 * second * zeroth + 2 * first**2 - 4 * s * first * zeroth
    diagonal = float((c**2 * ((1 + s - 2 * w) ** 2 - (s - 2 * w) ** 2)).sum())
    return trace**2 / (pairs + diagonal)


def _t(degrees: float) -> float:
    return t_quantile(0.5 + CONFIDENCE / 2, degrees)
