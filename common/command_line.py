"""The parsers of the commands: errors are raised, those of a --config file name it, and YAML names no key twice."""

import os
from argparse import ArgumentError
from typing import Any

import jsonargparse
import yaml

from common.errors import UsageError


class NamesConfigFiles:
    """For a parser of jsonargparse: errors in a config file name the file, which jsonargparse itself does not."""

    def parse_path(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> jsonargparse.Namespace:
        try:
            return super().parse_path(path, *args, **kwargs)  # type: ignore[misc, no-any-return]
        except (yaml.YAMLError, ArgumentError, UsageError, UnicodeDecodeError) as error:
            raise UsageError(f"{os.fspath(path)}: {str(error).removeprefix('Problems parsing config: ')}") from error


class CommandParser(NamesConfigFiles, jsonargparse.ArgumentParser):
    """Raises UsageError or ArgumentError instead of printing its usage text and exiting."""

    def __init__(self, *args: Any, exit_on_error: bool = False, **kwargs: Any) -> None:
        """exit_on_error: of the parsers that this one makes for the arguments of a class; no command sets it."""
        refuse_duplicate_keys()
        super().__init__(*args, exit_on_error=exit_on_error, **kwargs)


class DuplicateKey(yaml.YAMLError):
    """A mapping that names a key twice."""


def check_keys(node: yaml.Node | None, path: str = "") -> None:
    """Raises DuplicateKey with both lines."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            check_keys(item, path)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[Any, int] = {}
    for key, value in node.value:
        line, name = key.start_mark.line + 1, str(key.value)
        if name in lines and name != "<<":
            raise DuplicateKey(
                f"the key {path}{name} is there twice, in lines {lines[name]} and {line}: keep one of them"
            )
        lines[name] = line
        check_keys(value, f"{path}{name}.")


def refuse_duplicate_keys() -> None:
    """In all YAML that jsonargparse's parsers read in this process: the first of two would be ignored without a
    word."""
    load = jsonargparse.get_loader("yaml")
    if getattr(load, "strict", False):
        return

    def strict_load(stream: str) -> Any:
        if isinstance(stream, str) and "\n" in stream:  # a file's content, not one value
            check_keys(yaml.compose(stream, Loader=yaml.SafeLoader))
        return load(stream)

    strict_load.strict = True  # type: ignore[attr-defined]
    jsonargparse.set_loader("yaml", strict_load, exceptions=(yaml.YAMLError,))
