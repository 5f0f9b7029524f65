"""When a kept result still holds: a key that changes with all that decides its numbers."""

import ast
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from common.dataclasses_json import read_kept
from common.files import write_json

ROOT = Path(__file__).resolve().parents[2]
Kind = TypeVar("Kind")


def reuse(path: Path, kind: type[Kind], measure: Callable[[], Kind], *, quiet: bool = False) -> Kind:
    """What the file keeps, else what measure() gives, which is kept there: an evaluation that was interrupted goes on.

    Args:
        kind: a dataclass.
        quiet: do not say that it was kept.

    Raises:
        ValueError: a file that is damaged, which it names.
    """
    if not path.is_file():
        write_json(path, asdict(measure()))  # type: ignore[call-overload]
    elif not quiet:
        tqdm.write(f"reusing {path}", file=sys.stderr)
    return read_kept(path, kind)


def result_key(
    checkpoint: Path,
    data_fingerprint: str,
    settings: Any,
    base_length: int,
    device: str,
    measuring: Sequence[str],
) -> str:
    """16 hexadecimal digits that change with the checkpoint's files, the data, the settings or the measuring code.

    Args:
        settings: A dataclass, such as eval.held_out.config.EvalConfig.
        measuring: Modules that decide the numbers, with all of this project that they import.
    """
    files = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(checkpoint.iterdir())}
    parts = [
        str(checkpoint.resolve()),
        files,
        data_fingerprint,
        asdict(settings),
        base_length,
        device,
        _code_hash(tuple(measuring)),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def _code_hash(modules: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for path in source_files(modules):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def source_files(modules: tuple[str, ...]) -> list[Path]:
    """The project's files that these modules consist of: their own and all that are imported from there, in functions
    too, sorted by path. Raises FileNotFoundError for a module that there is not."""
    found: set[Path] = set()
    waiting = list(modules)
    missing = [name for name in modules if _file_of(name) is None]
    if missing:
        raise FileNotFoundError(f"{ROOT} has no module {', '.join(missing)}")
    while waiting:
        name = waiting.pop()
        if (path := _file_of(name)) is None or path in found:
            continue
        found.add(path)
        waiting += [".".join(name.split(".")[:count]) for count in range(1, name.count(".") + 1)]  # packages around it
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return sorted(found)


def _file_of(module: str) -> Path | None:
    """None for a module of another project."""
    path = ROOT.joinpath(*module.split("."))
    candidates = (path / "__init__.py", path.with_suffix(".py"))
    return next((file for file in candidates if file.is_file()), None)
