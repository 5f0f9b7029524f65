"""Words for what an interval says."""

from collections.abc import Sequence
from typing import Literal

from eval.reporting.statistics import Interval

Side = Literal["low", "high"]


def standing(against: Interval, level: float, better: Side) -> str:
    """How a run stands to another: "ahead of", "behind", "level with", or "not told apart from" without an interval.

    Args:
        against: difference or ratio of the two.
        level: of two equal runs: 0 or 1.
        better: on which side of it the first run is better.
    """
    if against.low is None or against.high is None:
        return "not told apart from"
    if against.low <= level <= against.high:
        return "level with"
    return "ahead of" if (against.high < level) == (better == "low") else "behind"


def above(value: Interval, chance: Interval) -> bool:
    """Whether all of the first interval lies above all of the second; False where one of them has none."""
    return value.low is not None and chance.high is not None and value.low > chance.high


def listed(words: Sequence[str]) -> str:
    """For example "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def sentence(clauses: Sequence[str]) -> str:
    """Joined by semicolons, and nothing else changed: the first word may be a run's name."""
    return "; ".join(clauses) + "."
