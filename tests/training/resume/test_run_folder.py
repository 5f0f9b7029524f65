"""One training at a time writes to a run folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.conftest import ROOT, TrainProcess
from training.resume.run_folder import hold_run_folder

HOLD = """import sys, time
from pathlib import Path
from common.locks import folder_lock
with folder_lock(Path(sys.argv[1]), "taken"):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path: Path) -> "subprocess.Popen[str]":
    """Another process that has the run folder until it reads a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_training_ends_with_a_line(
    holder: "subprocess.Popen[str]", train: TrainProcess, tmp_path: Path
) -> None:
    done = train("--run_dir", tmp_path / "run", "--resume", "auto")
    assert done.returncode == 2 and f"error: --run_dir {tmp_path}/run is in use by another training" in done.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_it_waits_for_one_that_is_about_to_end(holder: "subprocess.Popen[str]", tmp_path: Path) -> None:
    assert holder.stdin
    holder.stdin.write("\n")
    holder.stdin.flush()
    hold_run_folder(tmp_path / "run", patience=60).close()


def test_further_ranks_do_not_ask(
    holder: "subprocess.Popen[str]", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    hold_run_folder(tmp_path / "run", patience=0)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="in use"):
        hold_run_folder(tmp_path / "run", patience=0)
