"""Files that are whole or absent; JSON that is what it should be, or an error that names file and key."""

import json
from pathlib import Path

import pytest

from common.errors import error_line
from common.files import read_json, to_rows, write_file, write_json


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space") as raised:
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        write_file(path, b"other")
    assert error_line(raised.value) == f"{path}: No space left on device"
    assert path.read_bytes() == b'{\n "a": 1\n}\n' and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert read_json(path, "") == {"a": 1}


def test_a_table_has_a_line_for_each_row() -> None:
    row = {"label": "a", "values": [1.5, None, True], "none": {}}
    table = {"name": "é", "rows": [row] * 20, "loss": list(range(500)), "empty": []}
    lines = to_rows(table).decode().splitlines()
    assert json.loads(to_rows(table)) == table
    assert len(lines) == 2 + 3 + 22 and lines[3] == f"  {json.dumps(row)}," and len(lines[-3]) > 1000
    assert to_rows(row).decode() == f"{json.dumps(row)}\n"
    keyed = {multiple: {"loss": [1.5] * 600} for multiple in (1, 16)}
    assert json.loads(to_rows(keyed)) == json.loads(json.dumps(keyed)) and len(to_rows(keyed).splitlines()) == 8
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_rows([float("nan")])


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[1]", "holds a list, expected an object"),
        ("{}", "lacks 'step', expected a whole number"),
        ('{"step": "3"}', "has a string as 'step', expected a whole number"),
        ('{"step": true}', "has true or false as 'step', expected a whole number"),
        ('{"step": 3, "loss": null}', "has null as 'loss', expected a number or a string"),
    ],
)
def test_what_is_read_is_checked_and_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="choose another") as found:
        read_json(path, "choose another", {"step": int, "loss": (float, str)})
    assert str(path) in str(found.value) and message in str(found.value)
    path.write_text('{"step": 3, "loss": 1}')
    assert read_json(path, "", {"step": int, "loss": (float, str)}) == {"step": 3, "loss": 1}
