"""How a run or an evaluation is tracked with Weights & Biases."""

from dataclasses import dataclass, field
from typing import Literal

PROJECT = "longsplash"


@dataclass(frozen=True)
class WandbConfig:
    """Tracking with Weights & Biases.

    Args:
        mode: "online", "offline" (files under the run's or report's folder, sent later with `wandb sync`) or
            "disabled".
        project, entity: as in wandb.init. None: in training the project longsplash and wandb's own entity, in an
            evaluation those that the evaluated runs were trained with.
        name: None for that of the folder.
        group: None: in training none, in an evaluation the evaluated runs' names.
        tags: as in wandb.init.

    Raises:
        ValueError: an empty project.
    """

    mode: Literal["online", "offline", "disabled"] = "disabled"
    project: str | None = None
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.project == "":
            raise ValueError("wandb.project is empty: expected the name of a project")
