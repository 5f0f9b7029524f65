"""Draws the plots of eval.run anew from its report.json.

    python -m benchmarks.analysis.report_plots results/smoke/report.json

Those that lie beside the file are replaced, or all of them with --all.
"""

from common.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # the imports take seconds

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common.dataclasses_json import to_dataclass
from common.errors import UsageError, run_command
from common.files import read_json
from eval.common.metrics import Series
from eval.held_out.analysis import choose_baseline, pair, summarise
from eval.held_out.config import EvalConfig
from eval.held_out.measurement import Measurement
from eval.held_out.report import Study, write_report

WAY_OUT = "pass the report.json that eval.run has written"
PARTS = {"config": dict, "measurements": list, "metrics": dict, "settings": dict}


def read_study(path: Path) -> Study:
    """What a report was made of. What is computed from the measurements is computed anew.

    Raises:
        ValueError, FileNotFoundError: not a report.json of eval.run.
    """
    raw = read_json(path, WAY_OUT, PARTS)
    measurements = [
        to_dataclass(one, Measurement, f"{path}: measurements[{i}]", WAY_OUT)
        for i, one in enumerate(raw["measurements"])
    ]
    baseline = choose_baseline(measurements)
    metrics = {
        label: {name: to_dataclass(one, Series, f"{path}: {name}", WAY_OUT) for name, one in series.items()}
        for label, series in raw["metrics"].items()
    }
    made = {
        "config": to_dataclass(raw["config"], EvalConfig, f"{path}: config", WAY_OUT),
        "measurements": measurements,
        "runs": [summarise(one) for one in measurements],
        "pairs": [pair(one, baseline) for one in measurements if one is not baseline],
        "metrics": metrics,
    }
    try:
        return Study(**{**raw, **made})
    except TypeError as error:  # a key that is missing or unknown
        raise UsageError(f"{path} is no report of this version ({error}): {WAY_OUT}") from error


def draw(path: Path, everything: bool) -> list[str]:
    """Writes PNG files beside report.json; a line for each."""
    study, lines = read_study(path), []
    with tempfile.TemporaryDirectory() as folder:
        for picture in write_report(study, Path(folder))[1]:
            beside = path.parent / picture.path.name
            if everything or beside.is_file():
                shutil.copyfile(picture.path, beside)
                lines.append(f"drew {beside}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one "error:" line on stderr."""

    def work(given: list[str]) -> list[str]:
        parser = argparse.ArgumentParser(prog="python -m benchmarks.analysis.report_plots", description=__doc__)
        parser.add_argument("report", type=Path, help="report.json of eval.run")
        parser.add_argument("--all", action="store_true", help="plots that do not lie beside it too")
        options = parser.parse_args(given)
        return draw(options.report, options.all)

    return run_command(work, arguments)


if __name__ == "__main__":
    sys.exit(main())
