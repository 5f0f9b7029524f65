import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.statistics import bootstrap_paired, bootstrap_ratio, resample_counts, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3: 81/263, 15/148, 0/20, 1/29.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(successes: int, trials: int, low: float, high: float) -> None:
    interval = wilson(successes / trials, trials)
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)


@given(st.integers(1, 500), st.floats(0, 1))
def test_wilson_holds_its_share_and_mirrors(trials: int, share: float) -> None:
    interval, mirrored = wilson(share, trials), wilson(1 - share, trials)
    assert 0 <= interval.low <= share + 1e-12 and share - 1e-12 <= interval.high <= 1
    assert math.isclose(interval.low, 1 - mirrored.high, abs_tol=1e-9)


@pytest.mark.parametrize(("share", "trials"), [(0.5, 0), (1.2, 5), (-0.1, 5)])
def test_wilson_refuses_what_is_no_share(share: float, trials: int) -> None:
    with pytest.raises(ValueError, match="expected a share"):
        wilson(share, trials)


def test_bootstrap_is_the_sample_mean_with_its_normal_interval() -> None:
    values = np.random.default_rng(3).normal(5, 2, 400)
    interval = bootstrap_ratio(values, np.ones(400), 4000, seed=0)
    half = 1.96 * values.std() / 20
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.03)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.03)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        weights = generator.integers(5, 50, 60)
        losses = weights * generator.normal(3, 1, 60)
        interval = bootstrap_ratio(losses, weights, 300, seed=0)
        covered += interval.low <= 3 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_bootstrap_is_a_ratio_of_sums_not_a_mean_of_ratios() -> None:
    assert bootstrap_ratio([1, 90], [1, 30], 100, seed=0).value == pytest.approx(91 / 31)


def test_same_seed_same_numbers_and_other_seed_other_numbers() -> None:
    values, weights = np.arange(1, 20), np.arange(20, 1, -1)
    assert bootstrap_ratio(values, weights, 200, 5) == bootstrap_ratio(values, weights, 200, 5)
    assert bootstrap_ratio(values, weights, 200, 5) != bootstrap_ratio(values, weights, 200, 6)


def test_pairing_removes_what_the_documents_share() -> None:
    generator = np.random.default_rng(0)
    tokens = np.full(50, 100)
    shared = 100 * generator.normal(4, 1, 50)
    first, second = shared + 5, shared
    difference, ratio = bootstrap_paired(first, second, tokens, 500, seed=0)
    assert difference.low == pytest.approx(0.05) and difference.high == pytest.approx(0.05)
    alone = bootstrap_ratio(first, tokens, 500, seed=0)
    assert alone.high - alone.low > 0.3
    assert ratio.low > 1 and ratio.value == pytest.approx(first.sum() / second.sum())


def test_pairs_of_different_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="same documents"):
        bootstrap_paired([1, 2], [1, 2, 3], [1, 1], 100, seed=0)


def test_one_document_has_an_interval_without_width() -> None:
    interval = bootstrap_ratio([3.0], [2.0], 100, seed=0)
    assert interval.low == interval.value == interval.high == 1.5
    with pytest.raises(ValueError, match="at least one document"):
        resample_counts(0, 10, 0)
