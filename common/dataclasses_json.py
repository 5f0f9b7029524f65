"""Dataclasses from the JSON that dataclasses.asdict gave, checked against their types."""

import types
import typing
from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from common.files import read_json

Kind = TypeVar("Kind")
MEASURE_AGAIN = "delete it: the same command measures it again"


def read_kept(path: Path, kind: type[Kind]) -> Kind:
    """A result that a command has kept. Raises ValueError that names the file and what is wrong in it, where it is
    damaged or of another form."""
    return to_dataclass(read_json(path, MEASURE_AGAIN), kind, str(path), MEASURE_AGAIN)


def to_dataclass(raw: Any, kind: type[Kind], where: str, way_out: str) -> Kind:
    """The dataclass whose dataclasses.asdict went through JSON to `raw`.

    Args:
        where: the file, for the message.
        way_out: what to do; ends the message.

    Raises:
        ValueError: a key that is missing or unknown, or a value of another type than the field's.
    """
    try:
        made: Kind = _build(raw, kind, where)
    except ValueError as error:
        raise ValueError(f"{error}; {way_out}") from error
    return made


def _build(raw: Any, kind: Any, where: str) -> Any:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return raw
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        known = {field.name: hints[field.name] for field in fields(kind)}
        needed = [field.name for field in fields(kind) if field.default is field.default_factory is MISSING]
        _check_keys(raw, needed, known, where)
        return typing.cast(Any, kind)(
            **{name: _build(value, known[name], f"{where}: {name}") for name, value in raw.items()}
        )
    if origin in (Union, types.UnionType):
        if raw is None and type(None) in parts:
            return None
        (inner,) = [part for part in parts if part is not type(None)]
        return _build(raw, inner, where)
    if origin is Literal:
        return _checked(raw, raw in parts, f"one of {', '.join(map(str, parts))}", where)
    if origin is list:
        _checked(raw, isinstance(raw, list), "a list", where)
        return [_build(one, parts[0], f"{where}[{i}]") for i, one in enumerate(raw)]
    if origin is tuple:
        _checked(raw, isinstance(raw, list) and len(raw) == len(parts), f"a list of {len(parts)}", where)
        return tuple(_build(one, part, f"{where}[{i}]") for i, (one, part) in enumerate(zip(raw, parts, strict=True)))
    if origin is dict:
        _checked(raw, isinstance(raw, dict), "an object", where)
        return {_key(key, parts[0], where): _build(value, parts[1], f"{where}: {key}") for key, value in raw.items()}
    if kind is float:
        fits = isinstance(raw, (int, float)) and not isinstance(raw, bool)
        return _checked(raw, fits, "a number", where)
    if kind is int:
        return _checked(raw, isinstance(raw, int) and not isinstance(raw, bool), "a whole number", where)
    return _checked(raw, isinstance(raw, kind), {str: "a string", bool: "true or false"}[kind], where)


def _check_keys(raw: Any, needed: Iterable[str], known: Iterable[str], where: str) -> None:
    _checked(raw, isinstance(raw, dict), "an object", where)
    for name in needed:
        if name not in raw:
            raise ValueError(f"{where} lacks {name!r}")
    for name in raw:
        if name not in known:
            raise ValueError(f"{where} has {name!r}, which is not known")


def _key(key: str, kind: type, where: str) -> Any:
    """JSON's keys are strings."""
    if kind is str:
        return key
    return int(_checked(key, key.isdecimal(), "whole numbers as keys", where))


def _checked(raw: Any, fits: bool, wanted: str, where: str) -> Any:
    if not fits:
        shown = repr(raw)
        raise ValueError(f"{where} is {shown if len(shown) < 60 else shown[:57] + '...'}, expected {wanted}")
    return raw
