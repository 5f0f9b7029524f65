"""The raw result of one checkpoint, kept as JSON so that a second evaluation reuses it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.dataclasses_json import read_kept
from common.files import write_json
from eval.attention_profile import LayerProfile
from eval.multi_needle import MultiNeedleCell
from eval.needle import NeedleCell
from eval.perplexity import PerplexityPlan, PerplexityResult

ROOT = Path(__file__).resolve().parent.parent
# Code that decides the numbers: a change there makes kept results stale; a change of the report does not.
MEASURING = (
    "eval/attention_profile.py",
    "eval/multi_needle.py",
    "eval/needle.py",
    "eval/perplexity.py",
    "eval/scoring.py",
)
MEASURING_FOLDERS = ("model", "kernels", "data")


@dataclass(frozen=True)
class Measurement:
    """Everything measured of one checkpoint, before statistics.

    Args:
        label: Short name in tables and plots.
        checkpoint: Its folder.
        training: Facts of the checkpoint's complete.json: samples, tokens, code_version, created.
        model: The model's configuration.
        policy: The sparse attention it ran under and what that kept, in words; empty for its own attention.
        seconds: Wall time of each part of the evaluation.
    """

    label: str
    checkpoint: str
    step: int
    training: dict[str, Any]
    model: dict[str, Any]
    parameters: int
    policy: str
    training_length: int
    precision: str
    hardware: str
    date: str
    seconds: dict[str, float]
    plan: PerplexityPlan
    perplexity: PerplexityResult
    needles: list[NeedleCell]
    multi_needles: list[MultiNeedleCell]
    needle_notes: list[str]
    attention: list[LayerProfile]


def result_key(
    checkpoint: Path,
    data_fingerprint: str,
    settings: Any,
    base_length: int,
    device: str,
    measuring: Sequence[str] = MEASURING,
) -> str:
    """16 hexadecimal digits that change with the checkpoint's files, the data, the settings or the measuring code.

    Args:
        settings: A dataclass, such as eval.config.EvalConfig.
        measuring: Files that decide the numbers, besides the folders that always do.
    """
    files = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(checkpoint.iterdir())}
    parts = [
        str(checkpoint.resolve()),
        files,
        data_fingerprint,
        asdict(settings),
        base_length,
        device,
        _code_hash(measuring),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _code_hash(measuring: Sequence[str]) -> str:
    files = [ROOT / name for name in measuring]
    for folder in MEASURING_FOLDERS:
        files.extend(sorted((ROOT / folder).rglob("*.py")))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def save_measurement(path: Path, measurement: Measurement) -> None:
    write_json(path, asdict(measurement))


def load_measurement(path: Path) -> Measurement:
    """Reads what save_measurement wrote. Raises ValueError that names the file where it is damaged."""
    return read_kept(path, Measurement)
