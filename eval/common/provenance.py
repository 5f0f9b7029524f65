"""Where numbers come from: code version, hardware, command, and the configuration a run was trained with."""

import os
import platform
import shlex
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from common.redaction import redact
from model.version import code_version


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What every study says of its numbers. command: as typed, without secrets. date: ISO 8601, in UTC."""

    code_version: str
    command: str
    hardware: str
    date: str

    def facts(self) -> dict[str, str]:
        """These fields alone, of a study too."""
        return {field.name: getattr(self, field.name) for field in fields(Provenance)}


def of_command(arguments: list[str], module: str, device: torch.device) -> Provenance:
    """Of numbers that this command has made just now."""
    return Provenance(
        code_version=code_version(), command=command_line(arguments, module), hardware=hardware(device), date=now()
    )


def hardware(device: torch.device) -> str:
    """For example "NVIDIA H100 80GB HBM3" or "Intel(R) Xeon(R) CPU, 2 cores"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = names[0].strip() if names else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def command_line(arguments: list[str], module: str = "eval.run") -> str:
    """As typed, without secrets."""
    return redact(shlex.join(["python", "-m", module, *arguments]))


def run_settings(checkpoint: Path) -> dict[str, Any]:
    """The resolved config.yaml of the run that a checkpoint belongs to; empty where the checkpoint was moved away.

    Raises:
        ValueError: a config.yaml that is not a YAML mapping.
    """
    path = checkpoint.resolve().parent.parent / "config.yaml"
    if not path.is_file():
        return {}
    try:
        settings = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds {type(settings).__name__}: expected the mapping that train.py wrote")
    return settings
