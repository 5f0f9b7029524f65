"""The parsers of the commands: errors are raised, those of a --config file name it, YAML names no key twice and no
alias within itself, numbers are those that 64-bit integers and float32 hold, nothing is empty, and what is given whole
is taken whole."""

import math
import os
import re
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from pathlib import Path
from pydoc import locate
from typing import Any

import jsonargparse
import yaml
from jsonargparse import _typehints

from common.errors import UsageError

LARGEST_INT = 2**63 - 1
LARGEST_FLOAT, SMALLEST_FLOAT = 3.4028234663852886e38, 1.1754943508222875e-38  # of float32, without subnormals


class StrictParsing:
    """For a parser of jsonargparse, which does none of this: errors in a config file name the file and the key, a group
    of options is a mapping, numbers are those that 64-bit integers and float32 hold, and options that are empty are
    refused.

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
        """Raises UsageError that says what to do; also where a text is empty, which as a path would be the folder that
        the command runs in."""
        positional = {action.dest for action in self._actions if not action.option_strings}  # type: ignore[attr-defined]
        try:
            given: jsonargparse.Namespace = super().parse_args(args, namespace, env, defaults, **kwargs)  # type: ignore[misc]
        except (ArgumentError, UsageError) as error:
            options = [name for action in self._actions for name in action.option_strings]  # type: ignore[attr-defined]
            raise UsageError(with_what_to_do(str(error), options, positional)) from error
        for key in empty_texts(given.as_dict()):
            if key not in self.may_be_empty:
                if key in positional:
                    raise UsageError(f"the argument {key} is empty: expected a path or a name")
                raise UsageError(f"--{key} is empty: expected a path, a name or a value; leave it out if it has none")
        return given

    def parse_path(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> jsonargparse.Namespace:
        name = os.fspath(path)
        try:
            found: jsonargparse.Namespace = super().parse_path(path, *args, **kwargs)  # type: ignore[misc]
            self.check_structure(found)
        except (yaml.YAMLError, ArgumentError, UsageError, UnicodeDecodeError) as error:
            message = str(error).removeprefix("Problems parsing config: ")
            if message.startswith("Unexpected config:"):
                message = f"expected options, as lines of `key: value`, and found {_content_in_words(name)}"
            raise UsageError(f"{name}: {message}") from error
        return found

    def validate(self, namespace: jsonargparse.Namespace, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("branch") is None:
            self.check_structure(namespace)
        super().validate(namespace, *args, **kwargs)  # type: ignore[misc]

    def check_structure(self, values: jsonargparse.Namespace) -> None:
        """Raises UsageError for a key that no option has, a group of options that is no mapping, and a number that is
        not finite, or beyond what 64-bit integers or float32 hold."""
        parser: Any = self
        options = {action.dest for action in parser._actions}
        groups = {dest[:end] for dest in options for end in range(len(dest)) if dest[end] == "."}
        groups -= options - set(parser.groups)  # a class's option.help makes no group of the option
        for name, value in _leaves(values, groups):
            if name in groups:
                inner = sorted(d for d in options if d.startswith(f"{name}.") and d.count(".") == name.count(".") + 1)
                some = ", ".join(inner[:3])
                raise UsageError(f"{name} is {_short(value)}: expected a mapping of its options ({some}, ...)")
            if name.rstrip("+") not in options and not jsonargparse_keeps(name):
                near = "".join(f"; the nearest one is {dest}" for dest in get_close_matches(name, options, n=1))
                raise UsageError(
                    f"the key {name} is not an option of this command{near}: correct it or leave it out (--help lists "
                    "all)"
                )
            check_numbers_fit(name, value)


REQUIRED = re.compile(
    r"""(?s)(?:Parser key "(?P<key>[^"]+)".*)?the following arguments are required: (?P<names>[^\s,]+(, [^\s,]+)*)"""
)
UNKNOWN = re.compile(r"unrecognized arguments: (--[^\s=]+)")


NO_FILE = re.compile(r"- Expected a path but [^\n]* either not accessible or invalid\s+- ")  # what else it could be
UNION = re.compile(
    r"(?s)Does not validate against any of the Union subtypes\n(?P<indent> *)Subtypes: \[(?P<types>[^\n]*)\]\n"
    r"(?P=indent)Errors:\n(?P<errors>.*?)\n(?P=indent)Given value type: [^\n]*\n(?P=indent)Given value: (?P<value>.*)"
)
# of a group of options that may be null, one of whose own is at fault
INNER = re.compile(
    r"""(?s)Parser key "(?P<group>[^"]+)":\s+Does not validate against any of the Union subtypes\s+"""
    r"""Subtypes: \[[^\]]*<class 'NoneType'>\]\s+Errors:\s+- (?:Problem with [^:]*:\s+)?"""
    r"""Parser key "(?P<key>[^"]+)":\s+(?P<error>.*?)\s+- Expected a <class 'NoneType'>\s+Given value type: .*"""
)
# errors of a union's types that tell more than which type they are of
TELLING = re.compile(
    r"(?m)^ *- (the key [^\n]*|Problem with given class_path [^\n]*(?:\n(?! *- )[^\n]*)*|Parser key [^\n]*)"
)
OF_NO_KIND = re.compile(r"Import path [^\n]* does not correspond to a subclass of \w+")
NESTED = re.compile(r"NestedArg\(key='([^']*)', val='?(.*?)'?\)$")


def union_in_words(message: str) -> str:
    """A parser's message on a value that is of none of several types, as on one of a single type, instead of each
    type's own error; of these the one that says what is wrong inside a class is kept. On an option of a group that may
    be null: as on any other option."""

    def in_words(found: re.Match[str]) -> str:
        value, errors = NESTED.sub(r"\1 \2", found["value"]), found["errors"]
        if told := TELLING.search(errors):
            reason = re.sub(r'^Parser key "([^"]+)"', r"its \1", " ".join(told[1].split()))
            return reason if "Got value" in reason else f"{reason}. Got value: {value}"
        kinds = OF_NO_KIND.findall(errors)
        reason = f" ({kinds[0]})" if kinds and len(set(kinds)) == 1 else ""
        return f"Expected {_types_in_words(found['types'])}. Got value: {value}{reason}"

    message = INNER.sub(lambda found: f'Parser key "{found["group"]}.{found["key"]}": {found["error"]}', message)
    message = UNION.sub(in_words, NO_FILE.sub("", message))
    message = re.sub(r"Expected a typing\.Literal\[([^\]]*)\]", r"Expected one of \1", message)
    return re.sub(
        r"Expected a dot import path string: ", "Expected a mapping of options, or a class. Got value: ", message
    )


def _types_in_words(types: str) -> str:
    """Types as Python writes them, "<class 'int'>, list[a.b.C], <class 'NoneType'>": int, list[C] or null."""
    by_name = False

    def short(found: re.Match[str]) -> str:
        nonlocal by_name
        name, kind = found[0].rpartition(".")[2], locate(found[0])
        options = is_dataclass(kind)
        by_name |= isinstance(kind, type) and not options and kind.__module__ != "collections.abc"
        return f"{name}'s options" if options else name

    types = re.sub(r"typing\.Literal\[([^\]]*)\]", r"\1", re.sub(r"<class '([^']+)'>", r"\1", types))
    types = re.sub(r"(?:[A-Za-z_]\w*\.)+[A-Za-z_]\w*", short, types).replace("NoneType", "null")
    types = re.sub(r"Union\[([^\]]*)\]", lambda found: found[1].replace(", ", " or "), types)
    *most, last = re.split(r", (?![^\[]*\])", types)
    kind = ", classes by name or import path" if by_name else ""
    return f"{', '.join(most)} or {last}{kind}" if most else f"{last}{kind}"


def with_what_to_do(message: str, options: Sequence[str], positional: Iterable[str]) -> str:
    """A message of a parser, with what to give where something is missing, the option that is nearest to an unknown
    one, and how all are listed.

    Args:
        options: of the command, with their dashes.
        positional: names of its arguments that are no options.
    """
    message = union_in_words(message)
    if found := REQUIRED.search(message):
        key, names = found["key"], found["names"].split(", ")
        if key:
            wanted = " and ".join(f"{key}.{name}" for name in names)
            told = f"{key} lacks {' and '.join(names)}, which it needs: give {wanted}"
        else:
            missing = " and ".join(name if name in positional else f"--{name}" for name in names)
            told = f"{missing} {'is' if len(names) == 1 else 'are'} needed: expected a value, none was given; add it"
        message = message[: found.start()] + told  # behind the name of a file, if one is at fault
    elif (unknown := UNKNOWN.match(message)) and (near := get_close_matches(unknown[1], options, n=1)):
        message = f"{message}; the nearest option is {near[0]}"
    return message if "--help" in message else f"{message} (--help lists all options)"


def _leaves(values: Any, groups: set[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What stands at each option, and at each group that is no mapping, by name."""
    for key, value in vars(values).items() if isinstance(values, jsonargparse.Namespace) else values.items():
        name = f"{prefix}{key}"
        if name in groups and isinstance(value, (jsonargparse.Namespace, Mapping)):
            yield from _leaves(value, groups, f"{name}.")
        else:
            yield name, value


def jsonargparse_keeps(name: str) -> bool:
    """Whether a key is one of jsonargparse's own, such as the path of a file that a group came from."""
    return name.rpartition(".")[2] in ("__path__", "__default_config__", "__orig__", "$schema")


def check_numbers_fit(name: str, value: Any) -> None:
    """Raises UsageError for a number that is beyond what a 64-bit integer or a float32 holds, however deep in `value`.
    Whether infinity and NaN make sense is for the option to say."""
    if isinstance(value, jsonargparse.Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        for key, inner in value.items():
            check_numbers_fit(f"{name}.{key}", inner)
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            check_numbers_fit(f"{name}[{index}]", inner)
    elif isinstance(value, int) and abs(value) > LARGEST_INT:
        raise UsageError(f"{name} is {_short(value)}: expected a whole number of 64 bits, at most {LARGEST_INT:,}")
    elif isinstance(value, float) and not (
        SMALLEST_FLOAT <= abs(value) <= LARGEST_FLOAT or not value or not math.isfinite(value)
    ):
        raise UsageError(
            f"{name} is {value}: expected a number that float32 holds, 0 or {SMALLEST_FLOAT:.1e} to "
            f"{LARGEST_FLOAT:.1e} in magnitude"
        )


def _short(value: Any) -> str:
    """A value as YAML has it, in a few words."""
    text = "null" if value is None else " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:30]}...{text[-20:]}"


def _content_in_words(path: str) -> str:
    try:
        return "an empty file" if not Path(path).read_text().strip() else "no mapping"
    except OSError:
        return "no mapping"


class CommandParser(StrictParsing, jsonargparse.ArgumentParser):  # type: ignore[misc]
    """Raises UsageError or ArgumentError instead of printing its usage text and exiting."""

    def __init__(
        self, *args: Any, exit_on_error: bool = False, may_be_empty: Iterable[str] = (), **kwargs: Any
    ) -> None:
        """exit_on_error: of the parsers that this one makes for the arguments of a class; no command sets it."""
        strict_yaml()
        take_values_whole()
        self.may_be_empty = may_be_empty
        super().__init__(*args, exit_on_error=exit_on_error, **kwargs)


class DuplicateKey(yaml.YAMLError):
    """A mapping that names a key twice."""


class EndlessYAML(yaml.YAMLError):
    """An alias within what it stands for, or nesting without end."""


def check_keys(node: yaml.Node | None, path: str = "", above: tuple[yaml.Node, ...] = ()) -> None:
    """Raises DuplicateKey with both lines, and EndlessYAML with the line of what contains itself."""
    if node in above:
        assert node is not None
        raise EndlessYAML(f"{path.rstrip('.') or 'it'} has an alias to itself (line {node.start_mark.line + 1})")
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            check_keys(item, path, (*above, node))
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
        check_keys(value, f"{path}{name}.", (*above, node))


def strict_yaml() -> None:
    """In all YAML that jsonargparse's parsers read in this process: the first of two equal keys would be ignored
    without a word, and a structure without end would end in a traceback."""
    load = jsonargparse.get_loader("yaml")
    if getattr(load, "strict", False):
        return

    def strict_load(stream: str) -> Any:
        try:
            if isinstance(stream, str) and any(sign in stream for sign in ":&"):  # a mapping or an anchor
                check_keys(yaml.compose(stream, Loader=yaml.SafeLoader))
            return load(stream)
        except RecursionError:
            raise EndlessYAML("it is nested deeper than can be read: expected options, some levels deep") from None

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
