"""Numbers that users give: finite, within bounds, and the message says so."""

import math
from typing import Any

import pytest

from common.checks import check_number


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (math.nan, {}, "x is nan: expected a finite number"),
        (math.inf, {"above": 0}, "x is inf: expected a finite number above 0"),
        (-1, {"least": 0, "zero": "never"}, r"x is -1: expected a finite number at least 0 \(0: never\)"),
        (0.5, {"whole": True, "least": 1}, "x is 0.5: expected a whole number at least 1"),
        (3, {"least": 1, "below": 3}, "x is 3: expected a finite number at least 1 and below 3"),
        (10**400, {"most": 2**20, "whole": True}, "expected a whole number at most 1,048,576"),
        (True, {}, "x is True"),
        ("3", {}, "x is '3'"),
        (None, {"least": 1}, "x is None: expected a finite number at least 1"),
        (0, {"above": 0, "null": "all"}, "x is 0: expected a finite number above 0, or null for all"),
    ],
)  # fmt: skip
def test_refused(value: object, bounds: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_number("x", value, **bounds)


def test_accepted() -> None:
    check_number("x", None, least=1, null="all")
    check_number("x", 1, least=1, most=1, whole=True)
    check_number("x", 10**400)
