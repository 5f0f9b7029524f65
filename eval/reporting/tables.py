"""Intervals as columns of flat tables."""

from eval.reporting.statistics import Interval


def interval_columns(name: str, interval: Interval | None) -> dict[str, float | None]:
    """The columns NAME, NAME_low and NAME_high; None in all of them where there is no interval."""
    value, low, high = (None, None, None) if interval is None else (interval.value, interval.low, interval.high)
    return {name: value, f"{name}_low": low, f"{name}_high": high}
