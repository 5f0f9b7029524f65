"""What the commands of eval share: settings as dataclasses."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from jsonargparse import Namespace

Config = TypeVar("Config")


def config_of(kind: type[Config], options: Namespace) -> Config:
    """An instance of a dataclass from the parsed options of its fields' names."""
    return kind(**{field.name: options[field.name] for field in fields(kind)})  # type: ignore[arg-type]


def check_least(config: Any, least: Mapping[str, int]) -> None:
    """Raises ValueError where a field lies below its least value; None is always fine."""
    for name, smallest in least.items():
        value = getattr(config, name)
        if value is not None and value < smallest:
            raise ValueError(f"{name} is {value}: expected at least {smallest}")
