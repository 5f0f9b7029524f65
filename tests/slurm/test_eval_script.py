"""How eval.sbatch divides its arguments, with an srun that writes down what it is told to run."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.training.conftest import ROOT

SRUN = """#!/bin/bash
printf '%s|' "${@:2}" >>"$CALLS"
echo >>"$CALLS"
[[ $* != *fails* ]] || exit 7
"""


def run(tmp_path: Path, *arguments: str) -> tuple[int, list[list[str]], str]:
    """Exit code, what srun was told to run, stderr."""
    srun, calls = tmp_path / "srun", tmp_path / "calls"
    srun.write_text(SRUN)
    srun.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls)}
    environment |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "5", "PYTHON": "python3"}
    script = ROOT / "slurm" / "eval.sbatch"
    done = subprocess.run(["bash", script, *arguments], env=environment, capture_output=True, text=True, timeout=20)
    told = [line.split("|")[:-1] for line in calls.read_text().splitlines()] if calls.exists() else []
    return done.returncode, told, done.stderr


def test_one_module_gets_its_arguments_as_they_are(tmp_path: Path) -> None:
    code, calls, _ = run(tmp_path, "eval.run", "runs/a b", "--lengths", "1", "2", "--name=x+y")
    assert code == 0
    assert calls == [["python3", "-m", "eval.run", "runs/a b", "--lengths", "1", "2", "--name=x+y"]]


def test_every_part_runs_and_the_first_failure_is_the_exit_code(tmp_path: Path) -> None:
    parts = ["eval.run", "fails", "+", "eval.twins", "--", "x", "+", "eval.length_generalisation", "y"]
    code, calls, _ = run(tmp_path, *parts)
    assert code == 7
    assert [call[2:] for call in calls] == [
        ["eval.run", "fails"], ["eval.twins", "--", "x"], ["eval.length_generalisation", "y"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "named"),
    [([], "''"), (["runs/x", "--data", "y"], "'runs/x'"), (["eval.run", "a", "+", "eval.absent"], "'eval.absent'"),
     (["eval.common", "a"], "'eval.common'"),
     (["+", "eval.run"], "''"), (["train"], "'train'")],
)  # fmt: skip
def test_a_wrong_module_ends_the_job_before_anything_runs(arguments: list[str], named: str, tmp_path: Path) -> None:
    code, calls, stderr = run(tmp_path, *arguments)
    assert code == 2 and calls == [] and f"error: {named} is no module of eval" in stderr
