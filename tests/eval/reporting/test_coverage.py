"""How often the intervals of eval.reporting hold the true value: nominally 95 %, at 5, 8, 12 and 30 units.

Shares are enumerated over all outcomes. Means over tasks are simulated, with tasks that are alike and tasks of very
different samples and difficulty, some of which no sample gets right. Ratios of sums are simulated too, with losses that
are skewed or heavy-tailed from document to document and documents of one size or of very different ones.
"""

import ast
import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from eval.held_out.config import EvalConfig
from eval.reporting import statistics
from eval.reporting.statistics import (
    Interval,
    mean_of_paired_shares,
    mean_of_shares,
    paired_shares,
    paired_sums,
    ratio_of_sums,
    share,
)

ROOT = Path(__file__).resolve().parents[3]
LEAST = 0.92
UNITS = (5, 8, 12, 30)
DRAWS = 1000
# below this, at most one simulation in forty of an interval that covers LEAST would be
BOUND = LEAST - 2 * math.sqrt(LEAST * (1 - LEAST) / DRAWS)
COVERED = {"share", "paired_shares", "ratio_of_sums", "paired_sums", "mean_of_shares", "mean_of_paired_shares"}

Draw = Callable[[np.random.Generator, tuple[int, ...]], NDArray[np.float64]]
# Losses of a token in one document, relative to the mean over documents.
RATES: dict[str, Draw] = {
    "log-normal 0.25": lambda g, shape: np.exp(0.25 * g.standard_normal(shape) - 0.25**2 / 2),
    "log-normal 0.5": lambda g, shape: np.exp(0.5 * g.standard_normal(shape) - 0.5**2 / 2),
    "Student's t(3)": lambda g, shape: np.maximum(1 + 0.15 * g.standard_t(3, shape), 0.01),
}
SIZES: dict[str, Draw] = {
    "one size": lambda g, shape: np.full(shape, 4096.0),
    "log-normal 1": lambda g, shape: np.ceil(1000 * np.exp(g.standard_normal(shape))),
}


def holds(interval: Interval, truth: float) -> bool:
    assert interval.low is not None and interval.high is not None
    return interval.low - 1e-9 <= truth <= interval.high + 1e-9


def documents(rates: str, sizes: str, count: int) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Tokens of each document (of 40 collections, which have an interval at all) and their relative losses."""
    generator = np.random.default_rng([len(rates), len(sizes), count])
    collections = 0
    while collections < 40:
        tokens = SIZES[sizes](generator, (count,))
        if ratio_of_sums(tokens * (1 + np.arange(count) % 2), tokens).low is None:
            continue
        collections += 1
        for losses in RATES[rates](generator, (DRAWS // 40, count)):
            yield tokens, losses


@pytest.mark.parametrize("count", UNITS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("rates", RATES)
def test_ratios_of_sums_cover_what_they_say(rates: str, sizes: str, count: int) -> None:
    held = [holds(ratio_of_sums(3 * tokens * losses, tokens), 3) for tokens, losses in documents(rates, sizes, count)]
    assert len(held) == DRAWS and np.mean(held) >= BOUND


@pytest.mark.parametrize("count", UNITS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("gaps", RATES)
def test_paired_differences_and_ratios_cover_what_they_say(gaps: str, sizes: str, count: int) -> None:
    """Two runs whose losses differ from document to document by 0.7 to 1.3 times, and whose gap, of either sign, has
    the distribution that is tried."""
    generator = np.random.default_rng(count)
    differences, ratios = [], []
    for tokens, gap in documents(gaps, sizes, count):
        second = 3 * tokens * generator.uniform(0.7, 1.3, count)
        differences.append(holds(paired_sums(second + 0.1 * tokens * (gap - 0.8), second, tokens), 0.02))
        second = 3 * tokens * np.linspace(0.7, 1.3, count)
        ratio = ratio_of_sums(second * (1 + 0.1 * (gap - 0.8)), second)
        if ratio.low is not None:
            ratios.append(holds(ratio, 1.02))
    assert len(ratios) > DRAWS / 2 and np.mean(differences) >= BOUND and np.mean(ratios) >= BOUND


@pytest.mark.parametrize("count", UNITS)
def test_shares_cover_what_they_say_wherever_the_truth_lies(count: int) -> None:
    shares = np.linspace(0.001, 0.999, 999)
    coverage = np.zeros_like(shares)
    for hits in range(count + 1):
        found = share(hits / count, count)
        assert found.low is not None and found.high is not None
        chance = math.comb(count, hits) * shares**hits * (1 - shares) ** (count - hits)
        coverage += chance * ((found.low <= shares) & (shares <= found.high))
    assert coverage.min() >= 0.95 - 1e-9


def test_shares_of_samples_that_count_in_part_cover_what_they_say() -> None:
    generator = np.random.default_rng(0)
    for truth in (0.1, 0.5, 0.95):
        hits = generator.binomial(6, generator.beta(3 * truth, 3 * (1 - truth), (DRAWS, 12)))  # of 6 tokens each
        totals, times = np.unique(hits.sum(1), return_counts=True)
        held = [holds(share(total / 72, 12), truth) for total in totals.tolist()]
        assert np.dot(held, times) / DRAWS >= BOUND


@pytest.mark.parametrize("count", UNITS)
def test_paired_shares_cover_what_they_say_wherever_the_truth_lies(count: int) -> None:
    """better, worse: chances that only the first run, or only the second, is right."""
    better, worse = (axis.ravel() for axis in np.meshgrid(*[np.append(0.002, np.linspace(0.02, 0.98, 33))] * 2))
    possible = better + worse < 0.999
    better, worse = better[possible], worse[possible]
    coverage = np.zeros_like(better)
    for b in range(count + 1):
        for c in range(count + 1 - b):
            equal = count - b - c
            found = paired_shares([1.0] * b + [0.0] * (c + equal), [0.0] * b + [1.0] * c + [0.0] * equal)
            assert found.low is not None and found.high is not None
            ways = math.comb(count, b) * math.comb(count - b, c)
            chance = ways * better**b * worse**c * (1 - better - worse) ** equal
            coverage += chance * ((found.low <= better - worse) & (better - worse <= found.high))
    assert coverage.min() >= LEAST and coverage.mean() >= 0.95


TASKS = {
    "two alike": [(12, 0.5), (12, 0.5)],
    "five of few samples": [(5, 0.2), (5, 0.9), (8, 0.5), (8, 0.05), (12, 0.4)],
    "twelve, most without a hit": [(25, 0.0)] * 8 + [(25, 0.04), (25, 0.3), (25, 0.6), (25, 0.95)],
    "very different sizes": [(1000, 0.25), (500, 0.5), (30, 0.9), (8, 0.3)],
}


@pytest.mark.parametrize("tasks", TASKS)
def test_means_over_tasks_cover_what_they_say(tasks: str) -> None:
    """A second run is right where the first one is, but for a tenth of the samples, which are drawn anew."""
    generator = np.random.default_rng(len(tasks))
    truth = float(np.mean([right for _, right in TASKS[tasks]]))
    means, differences = [], []
    for _ in range(DRAWS):
        first = [(generator.random(count) < right).astype(float) for count, right in TASKS[tasks]]
        second = []
        for (count, right), hits in zip(TASKS[tasks], first, strict=True):
            anew = generator.random(count) < 0.1
            second.append(np.where(anew, generator.random(count) < right, hits))
        means.append(holds(mean_of_shares(first), truth))
        differences.append(holds(mean_of_paired_shares(second, first), 0.0))
    assert np.mean(means) >= BOUND and np.mean(differences) >= BOUND


def test_a_mean_over_tasks_is_no_wider_than_its_tasks_allow() -> None:
    """Of many samples in all tasks: the normal interval of the mean of independent shares."""
    tasks = [np.arange(4000) % 4 == 0, np.arange(1000) % 2 == 0]
    found = mean_of_shares(tasks)
    half = 1.96 * math.sqrt(0.25 * 0.75 / 4000 + 0.25 / 1000) / 2
    assert found.value == 0.375 and found.units == 5000
    assert found.low is not None and found.value - found.low == pytest.approx(half, rel=5e-3)
    same = mean_of_paired_shares(tasks, tasks)
    assert same.value == 0 and same.high is not None and 0 < same.high < 0.002
    few = mean_of_shares([[1.0] * 4, [0.0] * 100])
    assert (few.value, few.low, few.high, few.units) == (0.5, None, None, 104)


def test_every_interval_is_one_of_those_covered_here() -> None:
    """Whatever makes an Interval lies in statistics.py and is simulated above. The one exception is the lowest and
    highest of several runs, which that of length generalisation names so."""
    public = {
        name
        for name, function in inspect.getmembers(statistics, inspect.isfunction)
        if function.__module__ == statistics.__name__
        and not name.startswith("_")
        and inspect.signature(function).return_annotation is Interval
    }
    assert public == COVERED
    makers, imported = {}, set()
    for path in [*ROOT.glob("eval/**/*.py"), *ROOT.glob("training/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]:
        if path == ROOT / "eval/reporting/statistics.py":
            continue
        tree = ast.parse(path.read_text())
        made = [
            n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func).split(".")[-1] == "Interval"
        ]
        if made:
            makers[str(path.relative_to(ROOT))] = len(made)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "eval.reporting.statistics":
                imported |= {name.name for name in node.names}
            names = [one.name for one in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            module = node.module if isinstance(node, ast.ImportFrom) else None
            assert "eval.reporting.quantiles" not in (module, *names), f"{path} makes intervals of its own"
            assert not {"NormalDist", "scipy"} & {module, *names}, f"{path} makes intervals of its own"
    assert imported == COVERED | {"Interval", "LEAST_UNITS"}
    # the paper's figures, without ends; lowest and highest of several runs
    assert makers == {"eval/length_generalisation/report.py": 2}


def test_the_default_number_of_documents_is_covered_here() -> None:
    assert EvalConfig().max_documents in UNITS and EvalConfig().max_documents > statistics.LEAST_UNITS
