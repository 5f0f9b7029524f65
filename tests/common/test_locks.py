"""One writer a folder: the lock ends with the process that took it, whatever its children do."""

import fcntl
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO

import pytest

from common.locks import LOCK, folder_lock

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("child", [False, True])
def test_a_killed_holder_leaves_no_lock_behind(tmp_path: Path, child: bool) -> None:
    fork = "(os.fork() or time.sleep(60)) and" if child else "True and"
    code = f"""import os, pathlib, sys, time
from common.locks import folder_lock
with folder_lock(pathlib.Path({str(tmp_path)!r}), "taken"):
    {fork} print(os.getpid(), flush=True)
    sys.stdin.read()
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert holder.stdout and holder.stdout.readline()
        with pytest.raises(ValueError, match="taken by another"), folder_lock(tmp_path, "taken by another"):
            pass
        holder.kill()
        holder.wait()
        with folder_lock(tmp_path, "taken by another"):
            pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(holder.pid, signal.SIGKILL)


def test_a_folder_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"), folder_lock(tmp_path / "file" / "run", ""):
        pass


def test_nothing_is_left_of_a_lock(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with folder_lock(tmp_path / "mine", ""):
        assert (tmp_path / "mine" / LOCK).exists()
    with suppress(ValueError), folder_lock(tmp_path / "new" / "below", ""):
        raise ValueError("refused")
    with folder_lock(tmp_path / "used" / "below", ""):
        (tmp_path / "used" / "result").write_text("kept")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "result", "used"]


def test_a_lock_file_that_was_removed_while_it_was_opened_holds_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, lockf = tmp_path / LOCK, fcntl.lockf
    files = []

    def removed_meanwhile(file: IO[str], how: int) -> None:
        files.append(file)
        if len(files) == 1:
            lock.unlink()
        lockf(file, how)

    monkeypatch.setattr(fcntl, "lockf", removed_meanwhile)
    with folder_lock(tmp_path, ""):
        assert len(files) == 2 and os.path.samestat(os.fstat(files[1].fileno()), lock.stat())


def test_a_forked_process_does_not_end_the_lock_of_its_parent(tmp_path: Path) -> None:
    held = folder_lock(tmp_path, "")
    held.__enter__()
    child = os.fork()
    if child == 0:
        held.__exit__(None, None, None)
        os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / LOCK).exists()
    held.__exit__(None, None, None)
    assert not (tmp_path / LOCK).exists()
