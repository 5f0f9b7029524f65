"""One writer a folder."""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"


@contextmanager
def folder_lock(folder: Path, taken: str) -> Iterator[None]:
    """Hold a folder, made where it is missing, against other processes, on any machine that shares the file system.

    The lock belongs to this process alone: it ends with it, however it ends, and processes forked from it do not have
    it. The file stays, so that nobody locks one that is being removed.

    Args:
        taken: the message of the ValueError that is raised when another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(taken) from error
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            print(f"warning: {folder} lies where files cannot be locked: nothing keeps two runs out of it", flush=True)
        yield
