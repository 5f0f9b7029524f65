"""One writer a folder."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

LOCK = ".lock"


@contextmanager
def folder_lock(folder: Path, taken: str) -> Iterator[None]:
    """Hold a folder, made where it is missing, against other processes, on any machine that shares the file system.

    The lock belongs to this process alone: it ends with it, however it ends, and processes forked from it do not have
    it. Afterwards its file is removed, and so are the folders that were made for it, where nothing else is in them:
    who is refused leaves nothing. A killed process leaves the file, which then keeps nobody out.

    Args:
        taken: the message of the ValueError that is raised when another process holds it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    file = _locked(folder, taken)
    holder = os.getpid()
    try:
        yield
    finally:
        if os.getpid() == holder:  # not in a process forked from it
            with suppress(OSError):
                (folder / LOCK).unlink()  # before it is unlocked: nobody else has it yet
            file.close()
            with suppress(OSError):
                for path in made:
                    path.rmdir()


def _locked(folder: Path, taken: str) -> IO[str]:
    """The folder's lock file, open and locked. One that its holder has removed meanwhile is no lock: others would make
    a new one."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = open(folder / LOCK, "a")  # noqa: SIM115
        except FileNotFoundError:
            if folder.exists():
                raise
            continue  # its holder has removed the folder
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                print(
                    f"warning: {folder} lies where files cannot be locked: nothing keeps two runs out of it", flush=True
                )
                return file
            file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(taken) from error
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK)):
                return file
        file.close()
