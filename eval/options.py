"""What the commands of eval share: settings as dataclasses, and one "error:" line for what the user can mend."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from jsonargparse import ArgumentError, Namespace

Config = TypeVar("Config")


def config_of(kind: type[Config], options: Namespace) -> Config:
    """An instance of a dataclass from the parsed options of its fields' names."""
    return kind(**{field.name: options[field.name] for field in fields(kind)})  # type: ignore[arg-type]


def check_least(config: Any, least: Mapping[str, int]) -> None:
    """Raises ValueError where a field lies below its least value; None is always fine."""
    for name, smallest in least.items():
        value = getattr(config, name)
        if value is not None and value < smallest:
            raise ValueError(f"{name} is {value}: expected at least {smallest}")


def run_command(work: Callable[[list[str]], Iterable[str]], arguments: Sequence[str] | None) -> int:
    """Prints the lines of work(arguments), by default those of the command line. Returns the exit code: 0, or 2 after
    one "error:" line on stderr."""
    try:
        for line in work(list(sys.argv[1:] if arguments is None else arguments)):
            print(line)
    except (ArgumentError, ValueError, FileNotFoundError, NotADirectoryError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
