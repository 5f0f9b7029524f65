"""A key that is there twice."""

import jsonargparse
import pytest

from common.command_line import refuse_duplicate_keys


def test_a_key_that_is_there_twice_is_named_with_its_lines() -> None:
    refuse_duplicate_keys()
    refuse_duplicate_keys()  # once more changes nothing
    load = jsonargparse.get_loader("yaml")
    assert load("a: {b: 1}\nc: 2\n") == {"a": {"b": 1}, "c": 2}
    with pytest.raises(Exception, match=r"the key a.b is there twice, in lines 2 and 4: keep one of them"):
        load("a:\n  b: 1\n  c: 2\n  b: 3\n")
