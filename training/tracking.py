"""Where a run's records go: metric files, wandb, the resolved config and the code version."""

import netrc
import os
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import yaml
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from common.errors import UsageError
from common.files import write_file
from common.redaction import redact, redact_config
from common.wandb_config import PROJECT, WandbConfig

if TYPE_CHECKING:
    import wandb


@rank_zero_only
def say(message: str) -> None:
    """Print one line to stderr, clear of a progress bar, from one process of the run."""
    tqdm.write(message, file=sys.stderr)


def session_name(start_step: int) -> str:
    """Name of what belongs to the session that started at a step, sortable as text."""
    return f"step-{start_step:08d}"


def make_loggers(run_dir: Path, start_step: int, wandb: WandbConfig) -> list[Logger]:
    """CSV always (RUN/metrics/step-XXXXXXXX/metrics.csv, one folder a session), wandb by config.

    A session that starts where an earlier one did replaces its folder: the same steps are trained again.
    """
    loggers: list[Logger] = [
        CSVLogger(run_dir, name="metrics", version=session_name(start_step), flush_logs_every_n_steps=1)
    ]
    check_wandb_login(wandb.mode)
    if wandb.mode != "disabled":
        loggers.append(
            TolerantWandbLogger(
                settings=wandb_settings(sys.argv),
                name=wandb.name or run_dir.name,
                save_dir=run_dir,
                id=wandb_run_id(run_dir),
                project=wandb.project or PROJECT,
                entity=wandb.entity,
                group=wandb.group,
                tags=wandb.tags,
                mode=wandb.mode,
            )  # fmt: skip
        )
    return loggers


class TolerantWandbLogger(WandbLogger):
    """A WandbLogger whose service may die: a signal to all of a job's processes ends it too, before the last save."""

    lost = False

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self.lost:
            return
        try:
            super().log_metrics(metrics, step)
        except ConnectionError as error:
            self.lost = True
            say(f"step {step}: wandb's process is gone ({error}): from here on this session logs to RUN/metrics only")


def wandb_settings(arguments: list[str]) -> "wandb.Settings":
    """Leaves out what may carry secrets: the remote's address and uncommitted changes (the code version is in the
    config), and, where `arguments` hold a secret, the metadata of which they are a part."""
    import wandb  # slow, and most runs do without

    secret = any(redact(argument) != argument for argument in (*arguments, " ".join(arguments)))
    return wandb.Settings(disable_git=True, x_disable_meta=secret)


def is_first_process() -> bool:
    """Whether this process is, or will start, rank 0, by what torchrun, srun and Lightning's launcher set: also before
    there is a Trainer."""
    environment = os.environ
    if "RANK" in environment:
        return int(environment["RANK"]) == 0
    if SLURMEnvironment.detect():
        return int(environment.get("SLURM_PROCID", 0)) == 0
    node = environment.get("NODE_RANK", environment.get("GROUP_RANK", 0))
    return int(node) == 0 and int(environment.get("LOCAL_RANK", 0)) == 0


def wandb_run_id(run_dir: Path) -> str | None:
    """The run's wandb id, kept in RUN/wandb_run_id so that every session continues the same wandb run. Rank 0 decides
    it, and it alone talks to wandb; None on others."""
    if not is_first_process():
        return None
    path = run_dir / "wandb_run_id"
    if not path.exists() or not path.read_text().strip():
        write_file(path, (uuid.uuid4().hex[:8] + "\n").encode())
    return path.read_text().strip()


def check_wandb_login(mode: str) -> None:
    """Raises UsageError where wandb would ask for a key and nobody is there to answer."""
    if mode != "online" or sys.stdin.isatty():
        return
    if any(name in os.environ for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        known = netrc.netrc(os.environ.get("NETRC") or None).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        known = None
    if known is None:
        raise UsageError(
            f"wandb.mode is online, but there is no API key for {host}: run `wandb login`, set WANDB_API_KEY, or use "
            "--wandb.mode offline (sent later with `wandb sync`)"
        )


@rank_zero_only
def record_session(run_dir: Path, start_step: int, config_yaml: str, version: str) -> None:
    """Keep the resolved config (config.yaml, and config.step-XXXXXXXX.yaml of each session) and the code version.

    Secrets in the config are hidden.
    """
    session, config = session_name(start_step), yaml.safe_load(config_yaml)
    if (safe := redact_config(config)) != config:
        config_yaml = yaml.safe_dump(safe, sort_keys=False)
    (run_dir / f"config.{session}.yaml").write_text(config_yaml)
    (run_dir / "config.yaml").write_text(config_yaml)
    with (run_dir / "code_version.txt").open("a") as file:
        file.write(f"{session} {version}\n")


@rank_zero_only
def log_config(loggers: list[Logger], config: dict[str, Any], version: str) -> None:
    """Give the resolved config, its secrets hidden, and the code version to wandb."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_hyperparams({**redact_config(config), "code_version": version})
