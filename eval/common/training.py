"""train.py as a process of its own: what it makes of its options, and how it ended."""

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from common.errors import UsageError
from common.exits import DIVERGED, INTERRUPTED, KEYBOARD, USER_ERROR
from eval.common import child

ROOT = Path(__file__).resolve().parents[2]


class Stopped(Exception):
    """Training was interrupted; the same command continues. code: this command's exit code."""

    def __init__(self, message: str = "", code: int = INTERRUPTED) -> None:
        super().__init__(message)
        self.code = code


def ask_training(options: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, str(ROOT / "train.py"), *options], capture_output=True, text=True)


def settings_of(options: Sequence[str]) -> dict[str, Any]:
    """What train.py makes of its options. Raises UsageError with its error line."""
    printed = ask_training([*options, "--print_config"])
    if printed.returncode:
        why = (printed.stderr.strip().splitlines() or [f"exit code {printed.returncode}"])[-1]
        raise UsageError(f"train.py: {why.removeprefix('error: ')}")
    found: dict[str, Any] = yaml.safe_load(printed.stdout)
    return found


def run_training(options: Sequence[str]) -> int:
    """train.py's exit code. Raises Stopped when a signal to this process or to train.py has stopped it."""
    code, told = child.run([sys.executable, str(ROOT / "train.py"), *options])
    if code == INTERRUPTED or (told is not None and code in (0, DIVERGED)):
        raise Stopped(f"stopped with everything saved: the same command continues (exit code {INTERRUPTED})")
    if told is not None and code in (KEYBOARD, -told):  # before there was anything to save, or by a second Ctrl-C
        raise Stopped(
            "stopped: the same command continues with what was saved before",
            KEYBOARD if told == signal.SIGINT else INTERRUPTED,
        )
    return code


def check_code(code: int, run: Path, *more: int) -> None:
    """Raises ValueError where training has failed, SystemExit where train.py's own error line says why."""
    if code == USER_ERROR:
        raise SystemExit(code)
    if code not in (0, *more):
        raise ValueError(f"training {run} ended with exit code {code}: see above, then run this command again")
