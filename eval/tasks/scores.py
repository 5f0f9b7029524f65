"""From the samples' values of tasks to numbers with 95 % intervals: per run, and paired between runs."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from eval.reporting.statistics import (
    LEAST_UNITS,
    Interval,
    mean_of_paired_shares,
    mean_of_shares,
    paired_shares,
    paired_sums,
    ratio_of_sums,
    share,
)
from eval.tasks.results import BITS, MEAN, PERPLEXITY, WEIGHTED_PERPLEXITY, Metric, TaskResult

METHODS = (
    "All intervals are 95 %. Means of values between 0 and 1: Clopper-Pearson, and Bonett and Price's for paired "
    "differences between runs (too wide, not too narrow, where a sample can count in part). Other means and "
    "perplexities: jackknife over samples with Student's t, on logs where all is positive. Differences are over the "
    f"samples that both runs were scored on. No interval below {LEAST_UNITS} samples. Means over tasks: every "
    "task counts alike, by its first score between 0 and 1; their intervals count samples, not the choice of tasks."
)


@dataclass(frozen=True)
class Score:
    """A metric of a task on one run. interval: None for aggregations that none is computed for, and without samples."""

    metric: str
    samples: int
    value: float | None
    interval: Interval | None
    share: bool  # a mean of values between 0 and 1


@dataclass(frozen=True)
class Difference:
    """A run minus the baseline, or for perplexities (ratio) divided by it, over the samples that both have."""

    metric: str
    samples: int
    interval: Interval
    ratio: bool


def score_metric(metric: Metric) -> Score:
    count = len(metric.values)
    is_share = _is_share(metric)
    if count == 0:
        return Score(metric.name, 0, None, None, is_share)
    if is_share:
        return Score(metric.name, count, metric.value, share(min(1.0, sum(metric.values) / count), count), True)
    parts = _ratio_parts(metric)
    if parts is None:
        return Score(metric.name, count, metric.value, None, False)
    return Score(metric.name, count, metric.value, _on_scale(metric, ratio_of_sums(*parts)), False)


def _is_share(metric: Metric) -> bool:
    return metric.aggregation == MEAN and all(0 <= value <= 1 for value in metric.values)


def compare(run: TaskResult, baseline: TaskResult, name: str) -> Difference | None:
    """None where there is nothing to pair, or the metric's aggregation is not a ratio of sums.

    Raises:
        ValueError: the two were not asked the same of the same documents.
    """
    if (run.data_hash, run.prompt_hash) != (baseline.data_hash, baseline.prompt_hash):
        raise ValueError(f"the runs were asked different questions in task {run.task} and cannot be paired")
    common = sorted(set(run.scored) & set(baseline.scored))
    ours, theirs = _metric(run, name), _metric(baseline, name)
    if not common or ours is None or theirs is None:
        return None
    ours, theirs = _only(ours, run.scored, common), _only(theirs, baseline.scored, common)
    if _is_share(ours) and _is_share(theirs):
        return Difference(name, len(common), paired_shares(ours.values, theirs.values), False)
    first, second = _ratio_parts(ours), _ratio_parts(theirs)
    if first is None or second is None:
        return None
    difference = paired_sums(first[0], second[0], first[1])
    ratio = ours.aggregation in (PERPLEXITY, WEIGHTED_PERPLEXITY)
    return Difference(name, len(common), _on_scale(ours, difference), ratio)


def mean_score(results: Sequence[TaskResult]) -> Score:
    """One run's mean over tasks of their `main_metric`, which all of them have."""
    interval = mean_of_shares([_main(one).values for one in results])
    return Score(_mean_name(results), interval.units or 0, interval.value, interval, True)


def compare_means(run: Sequence[TaskResult], baseline: Sequence[TaskResult]) -> Difference | None:
    """Of `mean_score`, over the samples of each task that both runs were scored on; None where a task has none."""
    pairs = []
    for ours, theirs in zip(run, baseline, strict=True):
        common = sorted(set(ours.scored) & set(theirs.scored))
        if not common:
            return None
        pairs.append([_only(_main(one), one.scored, common).values for one in (ours, theirs)])
    interval = mean_of_paired_shares(*zip(*pairs, strict=True))
    return Difference(_mean_name(run), interval.units or 0, interval, False)


def main_metric(result: TaskResult) -> Metric | None:
    """The first that is a mean of values between 0 and 1, of which 1 is best; None where there is none, or no value."""
    return next((one for one in result.metrics if one.values and one.higher_is_better and _is_share(one)), None)


def _main(result: TaskResult) -> Metric:
    metric = main_metric(result)
    assert metric is not None
    return metric


def _mean_name(results: Sequence[TaskResult]) -> str:
    names = {_main(one).name for one in results}
    return names.pop() if len(names) == 1 else "first score"


def merge(results: Sequence[TaskResult]) -> TaskResult:
    """The tasks of a group as one: all their samples together, with the means that all of them have."""
    first = results[0]
    if len(results) == 1:
        return first
    starts = np.cumsum([0] + [one.documents for one in results]).tolist()
    metrics = []
    for metric in first.metrics:
        found = [one for one in (_metric(result, metric.name) for result in results) if one is not None]
        if len(found) == len(results) and all(one.aggregation == MEAN for one in found):
            values = [value for one in found for value in one.values]
            mean = sum(values) / len(values) if values else None
            metrics.append(replace(metric, values=values, value=mean))
    chances = [(one.chance, len(one.scored)) for one in results]
    weighted = sum((chance or 0) * count for chance, count in chances) / max(1, sum(count for _, count in chances))
    return replace(
        first,
        task=f"{first.group} ({len(results)} tasks together)",
        data_hash=_joined(one.data_hash for one in results),
        prompt_hash=_joined(one.prompt_hash for one in results),
        documents=starts[-1],
        scored=[start + i for start, one in zip(starts, results, strict=False) for i in one.scored],
        too_long=[start + i for start, one in zip(starts, results, strict=False) for i in one.too_long],
        chance=None if any(chance is None for chance, _ in chances) else weighted,
        metrics=metrics,
        texts=None,
        seconds=round(sum(one.seconds for one in results), 2),
    )


def _joined(hashes: Iterable[str]) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _metric(result: TaskResult, name: str) -> Metric | None:
    return next((one for one in result.metrics if one.name == name), None)


def _only(metric: Metric, ids: Sequence[int], wanted: Sequence[int]) -> Metric:
    by_id = dict(zip(ids, metric.values, strict=True))
    return Metric(metric.name, metric.aggregation, metric.higher_is_better, [by_id[i] for i in wanted], metric.value)


def _ratio_parts(metric: Metric) -> tuple[np.ndarray, np.ndarray] | None:
    """(samples,) numerators and denominators whose sums' ratio is the metric, perplexities on the scale of nats."""
    values = np.asarray(metric.values, np.float64)
    match metric.aggregation:
        case "mean":
            return values, np.ones(len(values))
        case "perplexity":
            return -values, np.ones(len(values))
        case "weighted_perplexity" | "bits_per_byte":
            return -values[:, 0], values[:, 1]
    return None


def _on_scale(metric: Metric, interval: Interval) -> Interval:
    if metric.aggregation in (PERPLEXITY, WEIGHTED_PERPLEXITY):
        return interval.map(math.exp)
    return interval.map(lambda nats: nats / math.log(2)) if metric.aggregation == BITS else interval
