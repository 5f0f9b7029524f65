"""Ctrl-C ends every command with one line, while it is still importing too."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.exits import KEYBOARD

ROOT = Path(__file__).parents[2]
FOLDERS = ("data", "model", "training", "eval", "benchmarks")
COMMANDS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if 'if __name__ == "__main__":' in path.read_text() and path.name != "child.py"
)


def is_importing(pid: int) -> bool:
    """Whether a process has begun to load what is installed, such as torch."""
    return "site-packages" in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.parametrize("module", COMMANDS)
def test_ctrl_c_during_the_imports_is_one_line(module: str, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    while process.poll() is None and not is_importing(process.pid):
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    out, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr.split("\n"), out) == (KEYBOARD, ["", "stopped by Ctrl-C", ""], "")


def test_the_commands_are_found() -> None:
    assert {"data.prepare", "eval.run", "eval.tasks", "model.export", "training.memory"} < set(COMMANDS)
    assert len(COMMANDS) > 15
