"""Draws the plots of results/ from the numbers beside them.

    python -m benchmarks.plots                                        # all of them
    python -m benchmarks.plots results/quality/needles.json           # one

results/TOPIC/NAME.json becomes results/TOPIC/NAME.png. `Plot` says what a file holds. The plots of an evaluation's
report.json are python -m benchmarks.analysis.report_plots' to draw.
"""

from common.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # the imports take seconds

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from common.arguments import PlainParser
from common.dataclasses_json import to_dataclass
from common.errors import run_command
from common.files import read_json

RESULTS = Path(__file__).resolve().parents[1] / "results"
REPORT = "report.json"  # an evaluation's, which holds more than a plot
WAY_OUT = "benchmarks/plots.py says what a plot's file holds"
MOST_BANDS = 3  # more would hide each other
MOST_INSIDE = 6  # lines whose names find room between them
SCALES = {"x_scale": ("linear", "log", "log2"), "y_scale": ("linear", "log")}


@dataclass
class Line:
    """name: in the legend. x, y: the points. low, high: ends of their intervals, drawn as a band where few lines
    have them; empty for none."""

    name: str
    x: list[float]
    y: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)


@dataclass
class Plot:
    """title, x_label, y_label: with units. x_scale: linear, log, or log2 with a tick at every point. y_scale:
    linear or log. level: a dotted
    horizontal line, with its name. source: command, hardware, versions and date of the run that has the numbers."""

    title: str
    x_label: str
    y_label: str
    source: str
    lines: list[Line]
    x_scale: str = "linear"
    y_scale: str = "linear"
    level: float | None = None
    level_name: str = ""


def plot_files() -> list[Path]:
    """Of results/, sorted."""
    return sorted(path for path in RESULTS.rglob("*.json") if path.name != REPORT)


def read_plot(path: Path) -> Plot:
    """Raises ValueError, FileNotFoundError for a file that holds no plot."""
    plot = to_dataclass(read_json(path, WAY_OUT), Plot, str(path), WAY_OUT)
    for name, known in SCALES.items():
        if getattr(plot, name) not in known:
            raise ValueError(f"{path}: {name} is {getattr(plot, name)!r}: expected one of {known}")
    for line in plot.lines:
        lengths = {len(line.x), len(line.y), *(len(ends) for ends in (line.low, line.high) if ends)}
        for axis, values in (("x", line.x), ("y", [*line.y, *line.low, *line.high])):
            scale = getattr(plot, f"{axis}_scale")
            if scale != "linear" and not all(value > 0 for value in values):
                raise ValueError(
                    f"{path}: line {line.name!r} has {axis} {min(values)}: expected above 0, as {scale} shows"
                )
        if len(lengths) != 1:
            raise ValueError(f"{path}: line {line.name!r} has lists of {sorted(lengths)} points: expected one length")
    return plot


def draw(plot: Plot, path: Path) -> None:
    """Writes the PNG."""
    banded = sum(bool(line.low and line.high) for line in plot.lines) <= MOST_BANDS
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for line in plot.lines:
        (drawn,) = axes.plot(line.x, line.y, marker="o", markersize=4, label=line.name)
        if banded and line.low and line.high:
            axes.fill_between(line.x, line.low, line.high, alpha=0.15, color=drawn.get_color(), linewidth=0)
    if plot.level is not None:
        axes.axhline(plot.level, linestyle=":", color="black", linewidth=1, label=plot.level_name or None)
    if plot.x_scale == "log2":
        ticks = sorted({x for line in plot.lines for x in line.x})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{x:,g}" for x in ticks])
        axes.set_xticks([], minor=True)
    elif plot.x_scale == "log":
        axes.set_xscale("log")
        _round_ticks(axes.xaxis)
    lowest = min((y for line in plot.lines for y in (line.low or line.y)), default=math.nan)
    if plot.y_scale == "log":
        axes.set_yscale("log")
        _round_ticks(axes.yaxis)
    elif 0 <= lowest < 0.5 * max(y for line in plot.lines for y in (line.high or line.y)):
        axes.set_ylim(bottom=0)
    axes.set(title=plot.title, xlabel=plot.x_label, ylabel=plot.y_label)
    axes.grid(alpha=0.3)
    if len(plot.lines) > MOST_INSIDE:
        figure.legend(frameon=False, loc="outside right upper", fontsize="small")
    else:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _round_ticks(axis: Axis) -> None:
    """Of a logarithmic axis: 1, 2 and 5 times powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(NullLocator())


def draw_all(paths: Sequence[Path]) -> list[str]:
    """A line for each plot that is drawn."""
    lines = []
    for path in paths:
        draw(read_plot(path), image := path.with_suffix(".png"))
        lines.append(f"drew {image}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one "error:" line on stderr."""

    def work(given: list[str]) -> list[str]:
        parser = PlainParser(prog="python -m benchmarks.plots", description=__doc__)
        parser.add_argument("files", nargs="*", type=Path, help="results/TOPIC/NAME.json; all of them by default")
        return draw_all(parser.parse_args(given).files or plot_files())

    return run_command(work, arguments)


if __name__ == "__main__":
    sys.exit(main())
