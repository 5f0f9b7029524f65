"""Training metrics of a run folder, merged over its sessions."""

import csv
import re
from dataclasses import dataclass
from pathlib import Path

SESSION = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Series:
    """One metric over optimizer steps: steps rise, values are as logged."""

    steps: list[int]
    values: list[float]


def read_metrics(run_dir: Path | str) -> dict[str, Series]:
    """Every metric of a run by its column name, for example "train/loss".

    A run folder holds one metrics/step-XXXXXXXX/metrics.csv for each session, named after the step it started from.
    A session that was resumed from an earlier step replaces what older sessions logged from that step on.

    Returns:
        Metrics that were logged at least once; empty where the run folder has no metrics.

    Raises:
        FileNotFoundError: `run_dir` is not a folder.
        ValueError: a file without a step column, or a cell that is not a number.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"no run folder {run_dir}: give the --run_dir of a training run")
    merged: dict[str, dict[int, float]] = {}
    for start, path in _sessions(run_dir):
        for points in merged.values():
            for step in [step for step in points if step >= start]:
                del points[step]
        for name, step, value in _read_session(path):
            merged.setdefault(name, {})[step] = value
    ordered = {name: sorted(points.items()) for name, points in merged.items() if points}
    return {name: Series([s for s, _ in points], [v for _, v in points]) for name, points in sorted(ordered.items())}


def _sessions(run_dir: Path) -> list[tuple[int, Path]]:
    found = []
    for path in (run_dir / "metrics").glob("step-*/metrics.csv"):
        match = SESSION.fullmatch(path.parent.name)
        if match:
            found.append((int(match[1]), path))
    return sorted(found)


def _read_session(path: Path) -> list[tuple[str, int, float]]:
    points = []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if "step" not in (reader.fieldnames or []):
            raise ValueError(f"{path} has columns {reader.fieldnames}: expected a step column")
        for row in reader:
            for name, text in row.items():
                # A killed run may leave a half-written last line: DictReader gives None for what is missing.
                if name in (None, "step", "epoch") or not text:
                    continue
                try:
                    points.append((name, int(row["step"]), float(text)))
                except ValueError as error:
                    raise ValueError(f"{path} line {reader.line_num}: {name} is {text!r}, not a number") from error
    return points
