"""No secret in what a run writes."""

from pathlib import Path

from common.redaction import HIDDEN
from tests.training.conftest import callbacks, run_train
from training.tracking import wandb_settings


def test_wandb_leaves_out_the_command_line_only_where_it_holds_a_secret() -> None:
    assert not wandb_settings(["--run_dir", "runs/x"]).x_disable_meta
    assert wandb_settings(["--corpus.token", "abc"]).x_disable_meta
    assert wandb_settings([]).disable_git


def test_no_file_of_a_run_holds_a_secret(tiny_config: Path, tmp_path: Path) -> None:
    in_a_url, in_a_variable = "pa55w0rdInAnAddress", "tokenOfTheEnvironment"
    options = (
        "--run_dir",
        tmp_path / "run",
        "--trainer.max_steps",
        12,
        "--guard.max_skipped",
        0,
        "--wandb.mode",
        "offline",
    )
    # also a dump of the config: the guard gives up at the second step
    harm = callbacks(
        ("Note", {"text": f"https://me:{in_a_url}@example.org and {in_a_variable}"}),
        ("BadGradient", {"steps": [2], "rank": 0}),
    )
    done = run_train("--config", tiny_config, *options, harm, SOME_API_KEY=in_a_variable)
    assert done.returncode == 65, done.stderr
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"config.yaml", "step.json", "metrics.csv", "wandb_run_id"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        content = path.read_bytes()
        assert in_a_url.encode() not in content and in_a_variable.encode() not in content, path
    assert "example.org" in (tmp_path / "run" / "config.yaml").read_text()
    assert in_a_url not in done.stderr and in_a_variable not in done.stderr


def test_an_error_message_holds_no_secret(tiny_config: Path) -> None:
    done = run_train("--config", tiny_config, "--run_dir", "x", "--resume", "https://me:pa55w0rd@example.org/run")
    assert done.returncode == 2 and HIDDEN in done.stderr and "pa55w0rd" not in done.stderr
