"""One writer a folder: the lock ends with the process that took it, whatever its children do."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from common.locks import folder_lock

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
