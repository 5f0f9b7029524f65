"""What the commands of eval share: settings as dataclasses, and outputs that are tried before the work."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import Namespace

from common.errors import UsageError
from common.outputs import check_writable
from data.tokenizers.special_tokens import TOKENIZER_FILES

Config = TypeVar("Config")
# Of Ctrl-C, where results are kept one by one.
KEPT = "stopped by Ctrl-C: what was measured is kept, the same command continues"


def config_of(kind: type[Config], options: Namespace) -> Config:
    """An instance of a dataclass from the parsed options of its fields' names."""
    return kind(**{field.name: options[field.name] for field in fields(kind)})  # type: ignore[arg-type]


def check_least(config: Any, least: Mapping[str, int]) -> None:
    """Raises ValueError where a field lies below its least value; None is always fine."""
    for name, smallest in least.items():
        value = getattr(config, name)
        if value is not None and value < smallest:
            raise ValueError(f"{name} is {value}: expected at least {smallest}")


def check_most(config: Any, most: Mapping[str, int]) -> None:
    """Raises ValueError where a field lies above its greatest value; None is always fine."""
    for name, greatest in most.items():
        value = getattr(config, name)
        if value is not None and value > greatest:
            raise ValueError(f"{name} is {value}: expected at most {greatest}")


def check_output(folder: Path) -> None:
    """Makes the folder, if files can be written there: before the work, not after it. Raises UsageError."""
    with suppress(OSError):  # a name that is too long, which is said below
        corpus = (folder / "heldout").is_dir() and any((folder / n).is_file() for n in TOKENIZER_FILES)
        if corpus or (folder / "checkpoints").is_dir():
            raise UsageError(f"--output {folder} is a run's or a corpus's own folder: choose another one")
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)


def check_output_file(path: Path) -> None:
    """As check_output, of a file that will be written. Raises UsageError."""
    check_output(path.parent)
    try:
        if path.is_dir():
            raise UsageError(f"--output {path} is a folder: expected the name of a file")
    except OSError as error:  # a name that is too long
        raise UsageError(f"--output {path} cannot be written ({error.strerror}): choose another name") from error
