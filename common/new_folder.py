"""Folders that are written aside and renamed: complete or not there."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import UsageError


def check_new(output: Path, name: str = "output", outside: Iterable[Path] = ()) -> None:
    """Raises UsageError for a folder that is not new or empty, or is inside one of `outside`. name: of the argument,
    for the message."""
    try:
        if output.exists() and not output.is_dir():
            raise UsageError(f"{name} {output} is a file: expected a new folder")
        if output.exists() and any(output.iterdir()):
            raise UsageError(f"{name} {output} is not empty: expected a new folder")
    except OSError as error:
        raise UsageError(f"{name} {output} cannot be written ({error.strerror}): choose another folder") from error
    for kept in outside:
        if output.resolve().is_relative_to(kept.resolve()):
            raise UsageError(
                f"{name} {output} is inside {kept.resolve()}, which belongs to training: expected a folder elsewhere"
            )


@contextmanager
def written_aside(output: Path, name: str = "output") -> Iterator[Path]:
    """A folder to write, which becomes `output` (that check_new has passed) at the end, or is removed on an error.

    Raises UsageError where the place cannot be written.
    """
    made = [path for path in output.resolve().parents if not path.exists()]
    aside = output.resolve().with_name(f".{output.resolve().name}-{os.getpid()}.tmp")
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"{name} {output} cannot be written ({error.strerror}): choose another folder") from error
    try:
        yield aside
        aside.replace(output.resolve())
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        with suppress(OSError):  # not empty any more
            for path in made:
                path.rmdir()
        raise
