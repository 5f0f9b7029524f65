"""An evaluation's tables and plots in Weights & Biases, in the project of the runs that it evaluates."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from common.redaction import redact, redact_config
from common.wandb_config import PROJECT, WandbConfig
from eval.common import provenance
from eval.common.options import config_of
from eval.reporting.document import Picture

Row = dict[str, Any]


@dataclass(frozen=True)
class Records:
    """What an evaluation found.

    Args:
        facts: Of the evaluation, for wandb's config.
        tables: Rows by table name; the rows of a table have the same keys and hold numbers, text and None.
    """

    facts: dict[str, Any]
    tables: dict[str, list[Row]]
    pictures: list[Picture]


def add_wandb_arguments(parser: ArgumentParser) -> None:
    parser.add_class_arguments(WandbConfig, "wandb")


def wandb_config(options: Namespace) -> WandbConfig:
    return config_of(WandbConfig, options.wandb)


@dataclass(frozen=True)
class Tracker:
    """Where an evaluation of these runs is tracked.

    Made before anything is measured, so that a mistake in the options is found then.
    """

    config: WandbConfig
    project: str
    entity: str | None
    name: str
    group: str
    folder: Path

    def log(self, module: str, records: Records) -> None:
        """One wandb run with all tables and pictures. Raises ValueError where wandb refuses or cannot be reached.

        wandb is given no metadata of its own, of which the command line is a part, and no secret that redact knows.
        """
        if self.config.mode == "disabled":
            return
        import wandb  # slow, and most evaluations do without

        settings = wandb.Settings(disable_git=True, x_disable_meta=True, console="off", silent=True)
        try:
            with wandb.init(
                project=self.project, entity=self.entity, name=self.name, group=self.group, job_type=module,
                tags=self.config.tags, dir=self.folder, mode=self.config.mode, config=redact_config(records.facts),
                settings=settings,
            ) as run:  # fmt: skip
                logged = {name: _table(rows) for name, rows in records.tables.items() if rows}
                for picture in records.pictures:
                    logged[f"plots/{picture.path.stem}"] = wandb.Image(str(picture.path), caption=picture.caption)
                run.log(logged)
        except wandb.Error as error:
            raise ValueError(
                f"the evaluation is in {self.folder}, but wandb did not take it ({error}): --wandb.mode offline keeps "
                "it for `wandb sync`"
            ) from error
        print(f"wandb: {self.name} in project {self.project} ({self.config.mode})", file=sys.stderr)


def open_tracker(config: WandbConfig, checkpoints: Mapping[str, Path], output: Path) -> Tracker:
    """checkpoints: of the evaluated runs by label.

    Raises ValueError where the runs were trained in different projects and none is given.
    """
    return Tracker(
        config=config,
        project=config.project or _shared("project", checkpoints, config) or PROJECT,
        entity=config.entity or _shared("entity", checkpoints, config),
        name=config.name or output.resolve().name,
        group=config.group or "+".join(checkpoints),
        folder=output,
    )


def _shared(key: str, checkpoints: Mapping[str, Path], config: WandbConfig) -> str | None:
    """What wandb.KEY was in training; None where it was not recorded."""
    trained = {
        label: (provenance.run_settings(path).get("wandb") or {}).get(key) for label, path in checkpoints.items()
    }
    found = sorted({value for value in trained.values() if value is not None})
    if len(found) > 1 and config.mode != "disabled":
        said = ", ".join(f"{label} {value}" for label, value in trained.items())
        raise ValueError(f"the runs were trained in different wandb.{key} ({said}): say which with --wandb.{key}")
    return found[0] if found else None


def _table(rows: Sequence[Row]) -> Any:
    import wandb

    def cell(value: Any) -> Any:
        return redact(value) if isinstance(value, str) else value

    columns: list[Any] = list(rows[0])
    return wandb.Table(columns=columns, data=[[cell(row[name]) for name in columns] for row in rows])
