"""The batch scripts on a real two-node Slurm cluster: signals, crashes, requeues, and what is not requeued."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.checkpoint import find_checkpoints
from tests.slurm.cluster import Cluster, Job, install, running, wait_until
from tests.training.conftest import ROOT, TrainProcess, assert_same_weights, callbacks, corpus, tiny_config, train

__all__ = ["corpus", "tiny_config", "train"]  # fixtures
pytestmark = pytest.mark.timeout(500)  # with the installation
PRETRAIN = ROOT / "slurm" / "pretrain.sbatch"
SLOW = callbacks(("Pause", {"seconds": 0.1}))
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := install():
        pytest.skip(f"no Slurm cluster: {reason}")
    with running(tmp_path_factory.mktemp("slurm")) as started:
        yield started


def test_nothing_is_installed_where_the_user_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGSPLASH_SLURM_TESTS", "0")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("installs"))
    assert install() == "LONGSPLASH_SLURM_TESTS is 0"
    readme = (ROOT / "README.md").read_text()
    assert "`LONGSPLASH_SLURM_TESTS=0 make test` leaves that out" in readme and "installs Debian's Slurm" in readme


GONE = "3-1-tcp-localhost-1"  # a service of wandb that the submitting shell once had


def pretrain(cluster: Cluster, *options: object, **variables: str) -> Job:
    return cluster.submit(PRETRAIN, *options, sbatch=TWO_NODES, cwd=ROOT, PYTHON=sys.executable, **variables)


def newest_step(run_dir: Path) -> int:
    complete, _ = find_checkpoints(run_dir)
    return complete[-1].step if complete else 0


def rank_processes(run_dir: Path) -> dict[int, int]:
    """Process ids of a job's train.py by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text().split("\0")
            if "train.py" in words[1:2] and str(run_dir) in words:
                variables = dict(v.split("=", 1) for v in (folder / "environ").read_text().split("\0") if "=" in v)
                found[int(variables["SLURM_PROCID"])] = int(folder.name)
        except OSError:
            continue  # it has ended meanwhile
    return found


def test_signalled_then_killed_then_finished_with_the_weights_of_an_undisturbed_run(
    cluster: Cluster, train: TrainProcess, tiny_config: Path, tmp_path: Path
) -> None:
    run_dir, steps = tmp_path / "run", ("--trainer.max_steps", 60, "--checkpoint.every_n_steps", 10)
    job = pretrain(
        cluster,
        "--config",
        tiny_config,
        "--run_dir",
        run_dir,
        *steps,
        "--wandb.mode",
        "offline",
        SLOW,
        WANDB_SERVICE=GONE,
    )

    wait_until(lambda: newest_step(run_dir) >= 10, f"a first checkpoint\n{job.output}")
    job.signal("USR1")
    wait_until(lambda: job.field("Restarts") == "1", f"a requeue\n{job.output}")
    signalled_at = newest_step(run_dir)
    assert "told to stop" in job.output and f"newest checkpoint step-{signalled_at:08d}: requeueing" in job.output
    assert f"stopped by a signal at step {signalled_at}, which is saved" in job.output
    assert 10 < signalled_at < 60

    wait_until(lambda: newest_step(run_dir) > signalled_at, f"progress after the requeue\n{job.output}")
    os.kill(rank_processes(run_dir)[1], signal.SIGKILL)
    wait_until(lambda: job.field("Restarts") == "2", f"another requeue\n{job.output}")
    assert "crashed (srun's exit code: " in job.output
    killed_after = newest_step(run_dir)
    assert killed_after < 60

    assert job.wait() == "COMPLETED" and "finished" in job.output
    undisturbed = train("--run_dir", tmp_path / "undisturbed", *steps, "--trainer.devices", 2)
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert_same_weights(run_dir, tmp_path / "undisturbed")

    sessions = [folder.name for folder in sorted((run_dir / "metrics").iterdir())]
    assert sessions == [f"step-{step:08d}" for step in (0, signalled_at, killed_after)]
    wandb_runs = {path.name.rsplit("-", 1)[1] for path in (run_dir / "wandb").glob("offline-run-*")}
    assert wandb_runs == {(run_dir / "wandb_run_id").read_text().strip()}
    logs = run_dir / "slurm" / f"job-{job.number}"
    assert {str(path.relative_to(logs)) for path in logs.rglob("*.log")} == {
        f"restart-{restart}/node-{node}.log" for restart in range(3) for node in range(2)
    }


def test_crashes_without_progress_end_the_job(cluster: Cluster, tiny_config: Path, tmp_path: Path) -> None:
    options = ("--config", tiny_config, f"--run_dir={tmp_path / 'run'}", callbacks(("KillAfterStep", {"step": 3})))
    job = pretrain(cluster, *options, MAX_RESTARTS="1")
    assert job.wait() == "FAILED"
    assert job.field("Restarts") == "1"
    assert "crashed (srun's exit code: 137), newest checkpoint none: requeueing" in job.output
    assert "error: crashed" in job.output
    assert "1 restarts from checkpoint none have not given a newer one; not requeued" in job.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run_dir", "RUN", "--model.network.n_kv_heads", 3], "n_kv_heads: expected a divisor of n_heads = 2, got 3"),
        ([], "no --run_dir among the arguments"),
    ],
)
def test_a_user_error_is_not_requeued(
    options: list[object], message: str, cluster: Cluster, tiny_config: Path, tmp_path: Path
) -> None:
    options = [tmp_path / "run" if option == "RUN" else option for option in options]
    job = pretrain(cluster, "--config", tiny_config, *options)
    assert job.wait() == "FAILED"
    assert (job.field("Restarts"), job.field("ExitCode")) == ("0", "2:0")
    assert message in job.output, job.output


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, tiny_config: Path, tmp_path: Path) -> None:
    job = pretrain(cluster, "--config", tiny_config, "--run_dir", tmp_path / "run", "--trainer.max_steps", 500, SLOW)
    wait_until(lambda: newest_step(tmp_path / "run") > 0, f"training\n{job.output}")
    cluster.call("scancel", job.number)
    assert job.wait() == "CANCELLED"
    wait_until(lambda: not rank_processes(tmp_path / "run"), "the end of its processes")
    assert job.field("Restarts") == "0" and job.field("JobState") == "CANCELLED"


@pytest.mark.faults  # a minute
def test_tasks_of_an_array_where_there_is_no_scontrol(cluster: Cluster, tiny_config: Path, tmp_path: Path) -> None:
    """Each trains in a folder of its own, and stopped, says how it goes on where it cannot requeue itself."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for path in Path("/usr/bin").iterdir():
        if path.name != "scontrol":
            (programs / path.name).symlink_to(path)
    options = ("--config", tiny_config, "--run_dir", tmp_path / "run-%a", "--seed_everything=%a", SLOW)
    stop = ("--trainer.max_steps", 1000, "--trainer.max_time", "00:00:00:02")
    array = ("--nodes=1", "--ntasks-per-node=1", "--array=1-2")
    variables = {"PYTHON": sys.executable, "PATH": str(programs)}
    job = cluster.submit(PRETRAIN, *options, *stop, sbatch=array, cwd=ROOT, **variables)
    for number in (1, 2):
        task = Job(cluster, f"{job.number}_{number}", job.path)
        assert task.wait() == "FAILED", job.output
        assert (task.field("Restarts"), task.field("ExitCode")) == ("0", "75:0"), job.output
        run_dir = tmp_path / f"run-{number}"
        assert newest_step(run_dir) > 0 and f"seed_everything: {number}\n" in (run_dir / "config.yaml").read_text()
        assert f"newest checkpoint step-{newest_step(run_dir):08d}; no scontrol to requeue with" in job.output
    assert job.output.count("warning: there is no scontrol here") == 2
    assert job.output.count("the same sbatch continues") == 2


def test_prepare_and_eval(cluster: Cluster, train: TrainProcess, corpus: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(20):
        (texts / f"{number}.txt").write_text("a bee sees a sea of bees " * (10 + number))
    arguments = (
        "--corpus=data.corpora.TextFiles", f"--corpus.paths=[{texts}]", f"--output={tmp_path / 'prepared'}",
        "--tokenizer.vocab_size=384", "--heldout_fraction=0.2",
    )  # fmt: skip
    job = cluster.submit(ROOT / "slurm" / "prepare.sbatch", *arguments, cwd=ROOT, PYTHON=sys.executable)
    assert job.wait() == "COMPLETED", job.output
    assert (tmp_path / "prepared" / "manifest.json").exists()

    run_dir, report = tmp_path / "run", tmp_path / "report"
    assert train("--run_dir", run_dir, "--trainer.max_steps", 2).returncode == 0
    quick = ("--base_length=128", "--lengths", "1", "--headline_tokens=300", "--max_documents=2", "--needle_samples=1")
    absent = ("eval.length_generalisation", str(tmp_path / "absent"), "+")
    arguments = (*absent, "eval.run", str(run_dir), "--data", str(corpus), "--output", str(report), *quick)
    job = cluster.submit(ROOT / "slurm" / "eval.sbatch", *arguments, cwd=ROOT, PYTHON=sys.executable)
    assert job.wait() == "FAILED" and job.field("ExitCode") == "2:0"
    assert f"error: {tmp_path / 'absent'}: no such folder" in job.output
    assert (report / "report.html").exists() and "eval.run ended with exit code 0" in job.output, job.output
