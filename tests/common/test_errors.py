"""One error line and the exit code that says what to do next."""

import argparse
import sys

import pytest

from common.errors import run_command, user_errors


def command(error: BaseException) -> int:
    def work(_: list[str]) -> list[str]:
        raise error

    return run_command(work, [])


@pytest.mark.parametrize(
    "error, code, line",
    [
        (ValueError("lr is\n  nan: expected a number"), 2, "error: lr is nan: expected a number"),
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
