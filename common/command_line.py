"""The parsers of the commands: errors are raised, those of a --config file name it, YAML names no key twice, nothing
is empty, and what is given whole is taken whole."""

import os
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jsonargparse
import yaml
from jsonargparse import _typehints

from common.errors import UsageError


class StrictParsing:
    """For a parser of jsonargparse: errors in a config file name the file, and options that are empty are refused,
    neither of which jsonargparse itself does.

    Attributes:
        may_be_empty: options that take an empty text.
    """

    may_be_empty: Iterable[str] = ()

    def parse_args(  # type: ignore[misc]
        self,
        args: Sequence[str] | None = None,
        namespace: Any = None,
        env: bool | None = None,
        defaults: bool = True,
        **kwargs: Any,
    ) -> jsonargparse.Namespace:
        """Raises UsageError where a text is empty: as a path, it would be the folder that the command runs in."""
        given: jsonargparse.Namespace = super().parse_args(args, namespace, env, defaults, **kwargs)  # type: ignore[misc]
        positional = {action.dest for action in self._actions if not action.option_strings}  # type: ignore[attr-defined]
        for key in empty_texts(given.as_dict()):
            if key not in self.may_be_empty:
                name = key if key in positional else f"--{key}"
                raise UsageError(f"{name} is empty: expected a path, a name or a value; leave it out if it has none")
        return given

    def parse_path(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> jsonargparse.Namespace:
        try:
            return super().parse_path(path, *args, **kwargs)  # type: ignore[misc, no-any-return]
        except (yaml.YAMLError, ArgumentError, UsageError, UnicodeDecodeError) as error:
            raise UsageError(f"{os.fspath(path)}: {str(error).removeprefix('Problems parsing config: ')}") from error


class CommandParser(StrictParsing, jsonargparse.ArgumentParser):  # type: ignore[misc]
    """Raises UsageError or ArgumentError instead of printing its usage text and exiting."""

    def __init__(
        self, *args: Any, exit_on_error: bool = False, may_be_empty: Iterable[str] = (), **kwargs: Any
    ) -> None:
        """exit_on_error: of the parsers that this one makes for the arguments of a class; no command sets it."""
        refuse_duplicate_keys()
        take_values_whole()
        self.may_be_empty = may_be_empty
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


def empty_texts(value: Any, key: str = "") -> Iterator[str]:
    """The keys of texts without a character that shows, in nested mappings and lists, as "data.sources.path"."""
    if isinstance(value, str) and not value.strip():
        yield key
    elif isinstance(value, dict):
        for name, one in value.items():
            yield from empty_texts(one, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from empty_texts(one, key)


def take_values_whole() -> None:
    """In all parsers of this process: the items of a list, and a class, have the values that they are given with, and
    otherwise their defaults.

    By itself jsonargparse hands the items of a list what those of an earlier file have at their places, as long as
    there are as many, and a class the arguments of an earlier one that have the same names. Single options
    (--data.sources.weight 2, --corpus.paths) still change what there is, and files still merge key by key.
    """
    adapt = _typehints.adapt_typehints
    if getattr(adapt, "whole", False):
        return

    def adapt_whole(value: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("append") and "prev_val" in kwargs and (isinstance(value, list) or value == {}):
            kwargs["prev_val"] = _typehints.get_parsing_setting("unset_sentinel")
        return adapt(value, *args, **kwargs)

    def forget_arguments(_: Any, before: Any, value: Any) -> None:
        if before and "init_args" in before and before["class_path"] != value["class_path"]:
            before["init_args"] = jsonargparse.Namespace()

    adapt_whole.whole = True  # type: ignore[attr-defined]
    _typehints.adapt_typehints = adapt_whole  # type: ignore[assignment]
    _typehints.discard_init_args_on_class_path_change = forget_arguments
