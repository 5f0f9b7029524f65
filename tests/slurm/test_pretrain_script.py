"""What pretrain.sbatch refuses and adds, with an srun that writes down what it is told to run."""

import subprocess
import time
from pathlib import Path

import pytest

from tests.training.conftest import ROOT

SRUN = """#!/bin/bash
printf '%s|' "$@" >"$CALLS"
exit $SRUN_CODE
"""
SQUEUE = "#!/bin/bash\necho $TIME_LEFT\n"
SCONTROL = """#!/bin/bash
echo "$*" >>"$CALLS.scontrol"
echo JobState=RUNNING
"""
PROGRAMS = ("bash", "date", "hostname", "mkdir", "basename", "dirname", "grep", "tail", "env")


class Submitted:
    """The script, run as Slurm runs it, with stand-ins for Slurm's programs and nothing else of them in PATH."""

    def __init__(self, tmp_path: Path, *arguments: str, scontrol: bool = True, **variables: object) -> None:
        programs = tmp_path / "bin"
        programs.mkdir()
        for name in PROGRAMS:
            (programs / name).symlink_to(subprocess.check_output(["which", name], text=True).strip())
        stand_ins = {"srun": SRUN, "squeue": SQUEUE} | ({"scontrol": SCONTROL} if scontrol else {})
        for name, text in stand_ins.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        calls = tmp_path / "calls"
        environment = {"PATH": str(programs), "CALLS": str(calls), "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "5"}
        environment |= {"SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1"}
        environment |= {"TIME_LEFT": "UNLIMITED", "SRUN_CODE": "0", "PYTHON": "bash"}
        environment |= {name: str(value) for name, value in variables.items()}
        if "SLURM_JOB_END_TIME" in environment:
            environment["SLURM_JOB_END_TIME"] = str(int(time.time()) + int(environment["SLURM_JOB_END_TIME"]))
        done = subprocess.run(
            ["bash", ROOT / "slurm" / "pretrain.sbatch", *arguments], env=environment, capture_output=True, text=True
        )
        self.code, self.stdout, self.stderr = done.returncode, done.stdout, done.stderr
        self.told = calls.read_text().split("|") if calls.exists() else []
        requeues = Path(f"{calls}.scontrol")
        self.requeued = requeues.exists() and "requeue 5" in requeues.read_text()


def soon(seconds: int) -> dict[str, object]:
    return {"SLURM_JOB_END_TIME": seconds}  # from the script's start on


@pytest.mark.parametrize(
    "variables",
    [soon(240), soon(330), {"TIME_LEFT": "4:00"}, {"TIME_LEFT": "59"}, soon(600) | {"SIGNAL_LEAD": 600}],
)
def test_a_limit_within_the_lead_ends_at_once(variables: dict[str, object], tmp_path: Path) -> None:
    job = Submitted(tmp_path, "--run_dir", str(tmp_path / "run"), **variables)
    assert job.code == 2 and not job.told and not job.requeued
    (line,) = job.stderr.splitlines()
    assert "error: the time limit is" in line and "s before it" in line and "give --time" in line


@pytest.mark.parametrize(
    "variables",
    [{}, soon(3600), soon(240) | {"SIGNAL_LEAD": 60}, {"TIME_LEFT": "08:09"}, {"TIME_LEFT": "1-00:00:08"},
     {"TIME_LEFT": "1:00:00"}, {"TIME_LEFT": "INVALID"}],
)  # fmt: skip
def test_a_longer_limit_trains(variables: dict[str, object], tmp_path: Path) -> None:
    job = Submitted(tmp_path, "--run_dir", str(tmp_path / "run"), **variables)
    assert job.code == 0 and not job.stderr
    assert "train.py" in job.told and "--resume" in job.told


def test_tasks_of_an_array_have_folders_of_their_own(tmp_path: Path) -> None:
    array = {"SLURM_ARRAY_TASK_ID": 3, "SLURM_ARRAY_TASK_COUNT": 4}
    (tmp_path / "one").mkdir()
    (tmp_path / "own").mkdir()
    refused = Submitted(tmp_path / "one", "--run_dir", "/runs/x3", **array)
    assert refused.code == 2 and not refused.told
    assert "4 tasks of an array would train in one --run_dir /runs/x3: put %a into it" in refused.stderr
    run_dir = tmp_path / "run-%a" / "x"
    job = Submitted(tmp_path / "own", "--run_dir", str(run_dir), "--seed_everything=%a", **array)
    assert job.code == 0, job.stderr
    assert str(tmp_path / "run-3" / "x") in job.told and "--seed_everything=3" in job.told


def test_without_scontrol_the_job_says_how_to_go_on(tmp_path: Path) -> None:
    job = Submitted(tmp_path, "--run_dir", str(tmp_path / "run"), scontrol=False, SRUN_CODE=75)
    assert job.code == 75
    assert "warning: there is no scontrol here" in job.stdout
    assert "no scontrol to requeue with: the same sbatch continues" in job.stderr


def test_with_scontrol_it_is_requeued(tmp_path: Path) -> None:
    job = Submitted(tmp_path, "--run_dir", str(tmp_path / "run"), SRUN_CODE=75)
    assert job.code == 0 and job.requeued
