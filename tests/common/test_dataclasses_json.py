import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from common.dataclasses_json import read_kept


@dataclass(frozen=True)
class Part:
    place: int
    depth: float | None


@dataclass(frozen=True)
class Whole:
    name: Literal["a", "b"]
    good: bool
    parts: list[Part]
    pairs: dict[str, list[tuple[int, int]]]
    by_length: dict[int, Part]
    facts: dict[str, Any]
    late: str = "default"


WHOLE = Whole("a", True, [Part(1, None), Part(2, 0.5)], {"x": [(1, 2)]}, {8: Part(3, 1)}, {"any": [1, None]})


def test_what_asdict_wrote_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(asdict(WHOLE)))
    assert read_kept(path, Whole) == WHOLE
    raw = asdict(WHOLE)
    del raw["late"]
    path.write_text(json.dumps(raw))
    assert read_kept(path, Whole) == WHOLE


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"parts": {}}, ": parts is {}, expected a list"),
        ({"parts": [{"place": 1}]}, ": parts[0] lacks 'depth'"),
        ({"parts": [{"place": 1.5, "depth": 0}]}, ": parts[0]: place is 1.5, expected a whole number"),
        ({"parts": [{"place": True, "depth": 0}]}, ": parts[0]: place is True, expected a whole number"),
        ({"parts": [{"place": 1, "depth": "0"}]}, ": parts[0]: depth is '0', expected a number"),
        ({"parts": [3]}, ": parts[0] is 3, expected an object"),
        ({"pairs": {"x": [[1]]}}, ": pairs: x[0] is [1], expected a list of 2"),
        ({"by_length": {"one": {}}}, ": by_length is 'one', expected whole numbers as keys"),
        ({"name": "c"}, ": name is 'c', expected one of a, b"),
        ({"good": 1}, ": good is 1, expected true or false"),
        ({"new": 1}, " has 'new', which is not known"),
    ],
)
def test_what_is_damaged_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(asdict(WHOLE) | change))
    with pytest.raises(ValueError) as found:
        read_kept(path, Whole)
    assert str(found.value) == f"{path}{said}; delete it: the same command measures it again"


@pytest.mark.parametrize("text", ["", "{", "[1]", "\0"])
def test_files_that_hold_no_object_are_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"x\.json .*; delete it: the same command measures it again"):
        read_kept(path, Whole)
