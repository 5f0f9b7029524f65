import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats  # comes with lm_eval

from eval.reporting.formatting import count, fixed, interval_text, number_text, percent_text, significant
from eval.reporting.quantiles import beta_quantile, t_quantile
from eval.reporting.statistics import LEAST_UNITS, Interval, paired_shares, paired_sums, ratio_of_sums, share

INTERVALS: dict[str, Callable[[int], Interval]] = {
    "share": lambda n: share(0.5, n),
    "paired_shares": lambda n: paired_shares([1.0] * n, [0.0] * n),
    "ratio_of_sums": lambda n: ratio_of_sums(np.arange(1.0, n + 1), [2.0] * n),
    "paired_sums": lambda n: paired_sums(np.arange(1.0, n + 1), [1.0] * n, [2.0] * n),
}


def ends(interval: Interval) -> tuple[float, float]:
    assert interval.low is not None and interval.high is not None
    return interval.low, interval.high


@pytest.mark.parametrize("degrees", [0.5, 1, 2, 3.7, 11, 30, 1000])
def test_quantiles_of_student_are_scipys(degrees: float) -> None:
    for probability in (0.6, 0.9, 0.975, 0.9995):
        assert t_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=1e-9)


@pytest.mark.parametrize(("a", "b"), [(1, 10), (10, 11), (0.3, 5), (5000, 5001), (1, 1e5), (99999.5, 2)])
def test_quantiles_of_beta_are_scipys(a: float, b: float) -> None:
    for probability in (0.025, 0.5, 0.975):
        assert beta_quantile(probability, a, b) == pytest.approx(stats.beta.ppf(probability, a, b), rel=1e-8)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 5: 81/263, 15/148, 0/20, 1/29.
    [(81, 263, 0.2527, 0.3676), (15, 148, 0.0578, 0.1617), (0, 20, 0.0, 0.1684), (1, 29, 0.0009, 0.1776)],
)
def test_shares_have_the_published_intervals(successes: int, trials: int, low: float, high: float) -> None:
    assert tuple(round(end, 4) for end in ends(share(successes / trials, trials))) == (low, high)


@given(st.integers(LEAST_UNITS, 500), st.floats(0, 1))
def test_a_shares_interval_holds_it_and_mirrors(trials: int, mean: float) -> None:
    (low, high), (_, mirrored) = ends(share(mean, trials)), ends(share(1 - mean, trials))
    assert 0 <= low <= mean + 1e-12 and mean - 1e-12 <= high <= 1
    assert math.isclose(low, 1 - mirrored, abs_tol=1e-9)


@pytest.mark.parametrize(("mean", "trials"), [(0.5, 0), (1.2, 5), (-0.1, 5)])
def test_what_is_no_share_is_refused(mean: float, trials: int) -> None:
    with pytest.raises(ValueError, match="expected a share"):
        share(mean, trials)


@pytest.mark.parametrize("name", INTERVALS)
def test_there_is_no_interval_below_five_units(name: str) -> None:
    for units in range(1, LEAST_UNITS):
        found = INTERVALS[name](units)
        assert (found.low, found.high, found.units) == (None, None, units)
    low, high = ends(INTERVALS[name](LEAST_UNITS))
    assert low < high


def test_documents_of_one_size_have_students_interval() -> None:
    values = np.random.default_rng(3).normal(5, 2, 12)
    found = paired_sums(values, np.zeros(12), np.ones(12))
    half = 2.200985160 * values.std(ddof=1) / math.sqrt(12)
    assert found.value == pytest.approx(values.mean())
    assert ends(found) == pytest.approx((values.mean() - half, values.mean() + half))


def test_logs_keep_a_loss_positive_and_signs_are_taken_as_they_are() -> None:
    losses = [0.1, 0.2, 0.1, 9.0, 0.1]
    low, high = ends(ratio_of_sums(losses, np.ones(5)))
    assert 0 < low < high and high - 1.9 > 1.9 - low
    signed = ratio_of_sums([-1.0, *losses], np.ones(6))
    assert signed.low is not None and signed.low < 0
    alone = ratio_of_sums([0.0, 0.0, 0.0, 0.0, 1.0], np.ones(5))  # without the last one the sum has no logarithm
    assert ends(alone)[0] < 0


def test_a_ratio_is_of_sums_not_a_mean_of_ratios() -> None:
    assert ratio_of_sums([1, 90], [1, 30]).value == pytest.approx(91 / 31)


def test_documents_without_tokens_are_not_counted() -> None:
    losses, tokens = [3.0, 4.0, 5.0, 3.5, 4.5], [1.0, 2.0, 1.0, 1.0, 2.0]
    assert ratio_of_sums([*losses, 0.0], [*tokens, 0.0]) == ratio_of_sums(losses, tokens)


def test_few_large_documents_count_as_few() -> None:
    rates = np.where(np.arange(30) % 2, 2.7, 3.3)
    uneven = np.where(np.arange(30) < 4, 100.0, 1.0)
    (low, high), (even_low, even_high) = (ends(ratio_of_sums(rates * sizes, sizes)) for sizes in (uneven, np.ones(30)))
    assert high - low > 2 * (even_high - even_low)
    one = np.where(np.arange(30) < 1, 100.0, 1.0)  # about 1.3 documents' worth: no spread can be estimated
    assert ratio_of_sums(rates * one, one).low is None


def test_the_same_numbers_give_the_same_interval() -> None:
    values, weights = np.arange(1, 20), np.arange(20, 1, -1)
    assert ratio_of_sums(values, weights) == ratio_of_sums(values, weights)


def test_pairing_removes_what_the_documents_share() -> None:
    generator = np.random.default_rng(0)
    tokens = np.full(50, 100)
    shared = 100 * generator.normal(4, 1, 50)
    first, second = shared + 5, shared
    assert ends(paired_sums(first, second, tokens)) == pytest.approx((0.05, 0.05))
    low, high = ends(ratio_of_sums(first, tokens))
    assert high - low > 0.3
    ratio = ratio_of_sums(first, second)
    assert ends(ratio)[0] > 1 and ratio.value == pytest.approx(first.sum() / second.sum())


def test_pairs_of_different_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="same documents"):
        paired_sums([1, 2], [1, 2, 3], [1, 1])


def test_runs_that_agree_on_ten_samples_may_differ() -> None:
    low, high = ends(paired_shares([1.0, 0.0] * 5, [1.0, 0.0] * 5))
    assert -low == high == pytest.approx(0.2666, abs=1e-4)  # t(9) sqrt(2/12/12), Bonett and Price 2012 with Student's t
    assert ends(paired_shares([1.0] * 10, [0.0] * 10))[1] == 1.0


def test_ends_that_overflow_are_none() -> None:
    found = Interval(600.0, 400.0, 800.0, 5).map(math.exp)
    assert found == Interval(math.exp(600), None, None, 5)


def test_numbers_that_round_to_zero_have_no_sign_and_one_is_singular() -> None:
    assert [fixed(-0.0004, 3), fixed(-0.0006, 3), significant(-0.0), fixed(-1, 0)] == ["0.000", "-0.001", "0", "-1"]
    assert [count(1, "sample"), count(0, "sample"), count(1200, "sample")] == ["1 sample", "0 samples", "1,200 samples"]
    assert interval_text(Interval(-0.0001, -0.0004, 0.5, 9), 3) == "0.000 [0.000, 0.500]"
    assert percent_text(Interval(-0.001, -0.004, 0.5, 9)) == "0 % [0, 50]"


def test_text_says_where_there_is_no_interval() -> None:
    assert interval_text(Interval(2.1, None, None, 3)) == "2.10 (no interval: 3 documents)"
    assert percent_text(Interval(0.5, None, None, 1)) == "50 % (no interval: 1 sample)"
    assert number_text(Interval(1234567.0, None, None, 2)) == "1.235e+06 (no interval: 2 samples)"
    assert percent_text(Interval(0.994, 0.987, 0.997, 1000), 1) == "99.4 % [98.7, 99.7]"
