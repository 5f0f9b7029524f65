"""Options of commands that need none of jsonargparse: benchmarks run where kernels and torch are all that there is."""

import argparse
from pathlib import Path
from typing import NoReturn

from common.errors import UsageError


class PlainParser(argparse.ArgumentParser):
    """Raises UsageError instead of printing its usage text and exiting."""

    def __init__(self, prog: str | None = None, description: str | None = None) -> None:
        super().__init__(prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} ({self.prog} --help lists all options)")


def a_path(text: str) -> Path:
    """The type of an option that is a path: an empty one would be the folder that the command runs in."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: expected a path; leave it out if it has none")
    return Path(text)


def a_count(text: str) -> int:
    """The type of an option that counts: a whole number from 1 on."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"is {text!r}: expected a whole number, at least 1")
    return number
