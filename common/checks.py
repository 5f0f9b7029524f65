"""Checks of numbers that users give."""

import math
from collections.abc import Sequence

LARGEST_SEED = 2**63 - 1  # keys of random numbers are derived from 64 bits
LONGEST_CONTEXT = 2**24  # tokens: beyond all models, and their ids still fit any memory
MOST_SAMPLES = 10**7


def check_number(
    name: str,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    whole: bool = False,
    zero: str | None = None,
    null: str | None = None,
) -> None:
    """Raises ValueError unless `value` is a finite number within the bounds.

    Args:
        name: of the option, as a user writes it.
        least, most: bounds that the value may have.
        above, below: bounds that it may not have.
        whole: integers only.
        zero: what 0 means, where that is not plain.
        null: what None means, where the value may be that.
    """
    if value is None and null is not None:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = number and (isinstance(value, int) or (not whole and math.isfinite(value)))  # type: ignore[arg-type]
    fits = fits and (least is None or value >= least) and (above is None or value > above)  # type: ignore[operator]
    fits = fits and (most is None or value <= most) and (below is None or value < below)  # type: ignore[operator]
    if not fits:
        bounds = _bounds(least=least, above=above, most=most, below=below)
        meanings = f" (0: {zero})" * (zero is not None) + f", or null for {null}" * (null is not None)
        raise ValueError(f"{name} is {value!r}: expected {'a whole' if whole else 'a finite'} number{bounds}{meanings}")


def check_numbers(prefix: str, holder: object, names: Sequence[str], **bounds: object) -> None:
    """check_number of several attributes of a dataclass."""
    for name in names:
        check_number(prefix + name, getattr(holder, name), **bounds)  # type: ignore[arg-type]


def _bounds(*, least: float | None, above: float | None, most: float | None, below: float | None) -> str:
    """In words, as in " of at least 1 and below 10"."""
    words = {"at least": least, "above": above, "at most": most, "below": below}
    parts = [f"{word} {bound:,.12g}" for word, bound in words.items() if bound is not None]
    return " " + " and ".join(parts) if parts else ""
