"""Children get the signals of their parent, once, and end with it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PARENT = "import sys; from eval.common.child import run; print(*run(sys.argv[1:]))"
# notes its pid and every signal; ends a moment after the first one, as if it saved
CHILD = """
import os, signal, sys, time
folder, told = sys.argv[1], []
def note(number, frame):
    told.append(number)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, note)
with open(folder + "/aside", "w") as file:
    file.write(str(os.getpid()))
os.rename(folder + "/aside", folder + "/pid")
while not told:
    time.sleep(0.01)
time.sleep(0.2)
with open(folder + "/aside", "w") as file:
    file.write(" ".join(map(str, told)))
os.rename(folder + "/aside", folder + "/told")
sys.exit(75)
"""


def wait_for(what: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@contextmanager
def parent(folder: Path, prefix: str = "") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that runs CHILD, in a group of its own as a shell starts it, and the child's pid."""
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # ignored in the background
    code = heard + prefix + PARENT
    started = subprocess.Popen(
        [sys.executable, "-c", code, sys.executable, "-c", CHILD, str(folder)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, process_group=0,
    )  # fmt: skip
    try:
        wait_for((folder / "pid").exists)
        yield started, int((folder / "pid").read_text())
    finally:
        started.kill()
        started.wait()


def state(pid: int) -> str:
    """Letter of the process's state; "" when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("group", [False, True])
def test_a_signal_arrives_once_and_the_end_is_waited_for(number: signal.Signals, group: bool, tmp_path: Path) -> None:
    """group: as a terminal sends Ctrl-C, to every process in front."""
    with parent(tmp_path) as (started, _):
        (os.killpg if group else os.kill)(started.pid, number)
        out, _ = started.communicate(timeout=30)
    assert out.split() == ["75", str(int(number))]
    assert (tmp_path / "told").read_text() == str(int(number))


def test_a_killed_parent_lets_the_child_save(tmp_path: Path) -> None:
    with parent(tmp_path) as (started, child):
        started.kill()
        started.wait()
        wait_for(lambda: state(child) in ("", "Z"))
    assert (tmp_path / "told").read_text() == str(int(signal.SIGTERM))


def test_ctrl_c_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    ignoring = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    with parent(tmp_path, ignoring) as (started, _):
        started.send_signal(signal.SIGINT)
        time.sleep(0.1)
        assert started.poll() is None
        started.send_signal(signal.SIGTERM)
        out, _ = started.communicate(timeout=30)
    assert out.split() == ["75", "15"] and (tmp_path / "told").read_text() == "15"


def test_both_are_stopped_and_go_on_together(tmp_path: Path) -> None:
    with parent(tmp_path) as (started, child):
        started.send_signal(signal.SIGTSTP)
        wait_for(lambda: state(started.pid) == state(child) == "T")
        started.send_signal(signal.SIGCONT)
        wait_for(lambda: "T" not in (state(started.pid), state(child)))
        started.send_signal(signal.SIGTERM)
        assert started.communicate(timeout=30)[0].split() == ["75", "15"]


def test_handlers_are_as_before_and_codes_come_back() -> None:
    from eval.common.child import FORWARDED, run

    before = [signal.getsignal(number) for number in (*FORWARDED, signal.SIGTSTP)]
    assert run([sys.executable, "-c", "raise SystemExit(7)"]) == (7, None)
    assert run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == (-9, None)
    assert [signal.getsignal(number) for number in (*FORWARDED, signal.SIGTSTP)] == before
