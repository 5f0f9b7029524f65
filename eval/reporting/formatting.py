"""Numbers as text: counts, values, values with their intervals."""

from collections.abc import Callable

from eval.reporting.statistics import Interval


def fixed(value: float, digits: int) -> str:
    """With so many digits behind the point; what rounds to zero has no sign."""
    return _unsigned_zero(f"{value:.{digits}f}")


def significant(value: float, digits: int = 4) -> str:
    """With so many digits, for numbers of any size."""
    return _unsigned_zero(f"{value:.{digits}g}")


def count(number: int, noun: str) -> str:
    """For example "1 sample" and "1,200 samples"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def interval_text(interval: Interval, digits: int = 2, unit: str = "document") -> str:
    """For example "2.10 [2.05, 2.16]", or "2.10 (no interval: 3 documents)"."""
    return fixed(interval.value, digits) + _ends(interval, unit, lambda end: fixed(end, digits))


def percent_text(interval: Interval, digits: int = 0, unit: str = "sample") -> str:
    """For example "40 % [17, 69]"."""
    return f"{fixed(100 * interval.value, digits)} %" + _ends(interval, unit, lambda end: fixed(100 * end, digits))


def number_text(interval: Interval, unit: str = "sample") -> str:
    """Four digits of numbers of any size: the perplexity of a word can be huge."""
    return significant(interval.value) + _ends(interval, unit, significant)


def _ends(interval: Interval, unit: str, text: Callable[[float], str]) -> str:
    if interval.low is not None and interval.high is not None:
        return f" [{text(interval.low)}, {text(interval.high)}]"
    return " (no interval" + ("" if interval.units is None else f": {count(interval.units, unit)}") + ")"


def _unsigned_zero(text: str) -> str:
    return text.removeprefix("-") if float(text) == 0 else text
