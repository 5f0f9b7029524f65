"""Options of commands that need none of jsonargparse: benchmarks run where kernels and torch are all that there is."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

from common.errors import UsageError


class PlainParser(argparse.ArgumentParser):
    """Raises UsageError instead of printing its usage text and exiting."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} ({self.prog} --help lists all options)")


def a_path(text: str) -> Path:
    """The type of an option that is a path: an empty one would be the folder that the command runs in."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: expected a path; leave it out if it has none")
    return Path(text)
