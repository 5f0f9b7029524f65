"""Files that are whole or absent, also after a crash, and JSON that is what it should be."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROW = 1000  # characters of the longest row of a table in `to_rows`


def flush(path: Path) -> None:
    """Return when a file or the entries of a folder are on disk. Raises OSError if the disk refuses."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Raises an OSError of the block with the name of the file: one of reading has none."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write `content` aside, flush it, rename: `path` is complete or as it was. Raises OSError, leaving nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(aside)):
            raise type(error)(error.errno, error.strerror, str(path)) from error  # a full disk names no file
        raise
    flush(path.parent)


def to_json(value: Any, **options: Any) -> bytes:
    """UTF-8 with a line end; options: of json.dumps."""
    return (json.dumps(value, **{"indent": 1, **options}) + "\n").encode()


def to_rows(value: Any) -> bytes:
    """JSON for tables: an object or list of up to ROW characters stands on one line, as does a list of plain values; a
    line end. Raises ValueError for NaN."""

    def written(value: Any, indent: str) -> str:
        line = json.dumps(value)
        parts = list(value.values() if isinstance(value, dict) else value) if isinstance(value, dict | list) else []
        if len(line) <= ROW or not any(isinstance(part, dict | list) for part in parts):
            return line
        inner = [written(part, indent + " ") for part in parts]
        if isinstance(value, dict):
            inner = [f"{json.dumps(key)}: {part}" for key, part in zip(value, inner, strict=True)]
        opening, closing = "{}" if isinstance(value, dict) else "[]"
        return f"{opening}\n{indent} " + f",\n{indent} ".join(inner) + f"\n{indent}{closing}"

    plain = json.loads(json.dumps(value, allow_nan=False))  # keys are strings, as JSON's are
    return (written(plain, "") + "\n").encode()


def write_json(path: Path, value: Any, **options: Any) -> None:
    """`write_file` of JSON, by default refusing NaN, which other readers of JSON do. Raises OSError, ValueError."""
    write_file(path, to_json(value, **{"allow_nan": False, **options}))


def read_json(path: Path, way_out: str, keys: Mapping[str, type | tuple[type, ...]] | None = None) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        way_out: what to do when it is damaged; ends the message.
        keys: those it must have, with the types of their values.

    Raises:
        FileNotFoundError, ValueError: it is missing, no JSON object, or lacks a key or holds another type there.
        OSError: it cannot be read.
    """
    try:
        with naming(path):
            content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist; {way_out}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); {way_out}") from error
    return check_keys(content, keys or {}, str(path), way_out)


def check_keys(content: Any, keys: Mapping[str, type | tuple[type, ...]], where: str, way_out: str) -> dict[str, Any]:
    """`content`, if it is an object with these keys and types of values. where: file, and place in it, for the message.

    Raises ValueError that names the place, what is there and what was expected.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{where} holds {_kind(content)}, expected an object; {way_out}")
    for key, kind in keys.items():
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(_NAMES.get(one, one.__name__) for one in kinds)
        if key not in content:
            raise ValueError(f"{where} lacks {key!r}, expected {wanted}; {way_out}")
        value = content[key]
        # True is an int for Python, not for a reader; a float may be written without its point
        fits = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
        if not fits or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{where} has {_kind(value)} as {key!r}, expected {wanted}; {way_out}")
    return content


_NAMES: dict[type, str] = {
    dict: "an object", list: "a list", str: "a string", int: "a whole number", float: "a number", bool: "true or false",
    type(None): "null",
}  # fmt: skip


def _kind(value: Any) -> str:
    return _NAMES.get(type(value), type(value).__name__)
