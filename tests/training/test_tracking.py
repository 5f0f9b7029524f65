"""Records of a run: metric files, wandb, config."""

from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from common.wandb_config import WandbConfig
from tests.training.conftest import TrainProcess, callbacks
from training.tracking import (
    check_wandb_login,
    is_first_process,
    log_config,
    make_loggers,
    record_session,
    wandb_run_id,
)

SRUN_TASK_3 = {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "3"}


def test_sessions_have_their_own_metric_files(tmp_path: Path) -> None:
    for start, loss in ((0, 3.0), (10, 2.0)):
        (logger,) = make_loggers(tmp_path, start, WandbConfig())
        assert isinstance(logger, CSVLogger)
        logger.log_metrics({"train/loss": loss}, step=start + 1)
    first, second = sorted(tmp_path.glob("metrics/step-*/metrics.csv"))
    assert first.read_text().split() == ["step,train/loss", "1,3.0"]
    assert second.parent.name == "step-00000010" and second.read_text().split()[1] == "11,2.0"


def test_the_wandb_run_id_is_kept(tmp_path: Path) -> None:
    first = wandb_run_id(tmp_path)
    assert first and len(first) == 8 and wandb_run_id(tmp_path) == first
    assert (tmp_path / "wandb_run_id").read_text().strip() == first


def test_an_offline_wandb_run_is_continued_by_the_next_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("WANDB_SILENT", "WANDB_DISABLE_GIT", "WANDB_DISABLE_CODE"):
        monkeypatch.setenv(key, "true")
    config = WandbConfig(mode="offline", project="test", group="seeds", tags=["a"])
    ids = []
    for start in (0, 10):
        _, logger = loggers = make_loggers(tmp_path, start, config)
        assert isinstance(logger, WandbLogger)
        log_config(loggers, {"model": {"network": {"n_layers": 2}}}, "abc-dirty")
        logger.log_metrics({"train/loss": 1.0}, step=start + 1)
        run = logger.experiment
        ids.append(run.id)
        assert run.project == "test" and run.name == tmp_path.name and run.tags == ("a",)
        assert run.group == "seeds"
        assert run.config["code_version"] == "abc-dirty" and run.config["model"]["network"]["n_layers"] == 2
        assert run.settings.mode == "offline"
        run.finish()
    assert ids[0] == ids[1] == wandb_run_id(tmp_path)
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{ids[0]}"))) >= 1


def test_a_run_survives_its_wandb_process(train: TrainProcess, tmp_path: Path) -> None:
    end_wandb = callbacks(("EndWandb", {"step": 4}))
    done = train("--run_dir", tmp_path / "run", "--wandb.mode", "offline", "--trainer.max_steps", 12, end_wandb)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("wandb's process is gone") == 1 and "step 12/12" in done.stderr
    assert (tmp_path / "run" / "checkpoints" / "step-00000012" / "complete.json").exists()


def test_bad_wandb_project() -> None:
    with pytest.raises(ValueError, match="wandb.project is empty"):
        WandbConfig(project="")


def test_each_session_keeps_its_config(tmp_path: Path) -> None:
    record_session(tmp_path, 0, "a: 1\n", "one")
    record_session(tmp_path, 10, "a: 2\n", "two-dirty")
    assert (tmp_path / "config.yaml").read_text() == (tmp_path / "config.step-00000010.yaml").read_text() == "a: 2\n"
    assert (tmp_path / "config.step-00000000.yaml").read_text() == "a: 1\n"
    assert (tmp_path / "code_version.txt").read_text() == "step-00000000 one\nstep-00000010 two-dirty\n"


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"NODE_RANK": "1"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}, True),
        ({"RANK": "8", "LOCAL_RANK": "0", "GROUP_RANK": "1"}, False),
        ({"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "x", "SLURM_PROCID": "1"}, False),
        ({"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "x", "SLURM_PROCID": "0"}, True),
        (
            {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "bash", "SLURM_PROCID": "1"},
            True,
        ),  # a shell: its task does not count
    ],
)
def test_who_is_first(environment: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_NTASKS", "SLURM_JOB_NAME", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() == first


@pytest.mark.parametrize(
    "environment", [{"RANK": "1"}, {"LOCAL_RANK": "1"}, SRUN_TASK_3, {"LOCAL_RANK": "0", "NODE_RANK": "1"}]
)
def test_other_ranks_decide_no_wandb_id(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb_run_id(tmp_path) is None and not list(tmp_path.iterdir())


def test_a_shell_within_a_job_decides_its_wandb_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever task the shell is: a run that is started in it is whole."""
    for name, value in {**SRUN_TASK_3, "SLURM_JOB_NAME": "bash"}.items():
        monkeypatch.setenv(name, value)
    assert wandb_run_id(tmp_path)


def test_wandb_online_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ValueError, match="wandb.mode is online, but there is no API key for api.wandb.ai: run `wandb"):
        check_wandb_login("online")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    check_wandb_login("online")
