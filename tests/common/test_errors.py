"""One error line and the exit code that says what to do next."""

import argparse
import sys

import pytest

from common.arguments import PlainParser, a_path
from common.errors import run_command, user_errors


def command(error: BaseException) -> int:
    def work(_: list[str]) -> list[str]:
        raise error

    return run_command(work, [])


@pytest.mark.parametrize(
    "error, code, line",
    [
        (ValueError("lr is\n  nan: expected a number"), 2, "error: lr is nan: expected a number"),
        (ValueError("'a  b' comes back as 'a b'"), 2, "error: 'a  b' comes back as 'a b'"),
        (PermissionError(13, "Permission denied", "/data/x"), 2, "error: /data/x: Permission denied"),
        (argparse.ArgumentError(None, "unrecognized arguments: --x"), 2, "error: unrecognized arguments: --x"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
        (ValueError("https://user:pa55word@host/x"), 2, "error: https://[redacted]@host/x"),
    ],
)
def test_user_errors_are_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(error) == code
    assert capsys.readouterr().err.strip() == line


def test_crashes_and_debug_show_where_they_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError):
        command(TypeError("a bug"))
    with pytest.raises(ValueError), user_errors() as phase:
        phase.close()
        raise ValueError("after setup, a crash")
    monkeypatch.setattr(sys, "argv", ["x", "--debug"])
    with pytest.raises(ValueError):
        command(ValueError("shown"))


def test_debug_is_no_option_of_the_parser_but_behind_the_dashes() -> None:
    given: list[str] = []

    def work(arguments: list[str]) -> list[str]:
        given.extend(arguments)
        return []

    assert run_command(work, ["a", "--debug", "--", "--debug"]) == 0 and given == ["a", "--", "--debug"]


@pytest.mark.parametrize("arguments", [["--output="], ["--steps=1e9"], ["--step"]])
def test_a_plain_parser_ends_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def work(given: list[str]) -> list[str]:
        parser = PlainParser(prog="python -m x")
        parser.add_argument("--output", type=a_path)
        parser.add_argument("--steps", type=int)
        parser.parse_args(given)
        return []

    assert run_command(work, arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: argument --") and line.endswith(" (python -m x --help lists all options)\n")
