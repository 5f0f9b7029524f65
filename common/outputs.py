"""Places to write to that are tried before the work."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from common.errors import UsageError


def check_writable(folder: Path, name: str = "--output") -> None:
    """Makes the folder and writes a file there, both of which are removed again. Raises UsageError.

    Args:
        name: of the option or argument, for the message.
    """
    made = [path for path in (folder, *folder.parents) if not _exists(path)]
    try:
        if _exists(folder) and not folder.is_dir():
            raise UsageError(f"{name} {folder} is a file: expected a folder, or a path where one can be made")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable-", buffering=0) as file:
            file.write(b"x" * 4096)
            os.fsync(file.fileno())
    except OSError as error:
        raise UsageError(f"{name} {folder} cannot be written ({error.strerror}): choose another folder") from error
    finally:
        with suppress(OSError):
            for path in made:
                path.rmdir()


def _exists(path: Path) -> bool:
    """Not where it cannot be told: its name may be too long."""
    try:
        return path.exists()
    except OSError:
        return False
