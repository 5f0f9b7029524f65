"""How plots look: colours and marks, axes over lengths, labels at the ends of lines, and the file they become."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from common.files import write_file

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MOST_TICKS = 6  # with which numbers such as 131,072 stay apart
PHONE_INCHES = 5.4  # a figure of this width can be read on a phone; a wider one scrolls there
ONE_PANEL = (PHONE_INCHES, 3.8)
DOTS_PER_INCH = 200
STYLE: dict[Any, Any] = {
    "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e3e6ea",
    "axes.axisbelow": True, "figure.dpi": DOTS_PER_INCH, "savefig.dpi": DOTS_PER_INCH, "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True, "font.family": "DejaVu Sans",
}  # fmt: skip


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]


def save_figure(figure: Figure, path: Path) -> Path:
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix.removeprefix("."))
    write_file(path, image.getbuffer())
    return path


def log_ticks(axes: Axes, values: Sequence[float], labels: Sequence[str]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(values), list(labels))
    axes.xaxis.set_minor_locator(NullLocator())


def plain_log_y(axes: Axes) -> None:
    axes.set_yscale("log")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(plain)
    low, high = axes.get_ylim()
    # Within one decade the major ticks alone leave an axis almost bare.
    axes.yaxis.set_minor_formatter(plain if high / low < 12 else NullFormatter())


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str]]) -> None:
    """Writes each line's label right of its end (x, y), in its colour, pushed apart where lines end close together."""
    gap = 15.0  # points
    points = 72 / axes.figure.dpi
    heights = [float(axes.transData.transform((x, y))[1]) * points for x, y, _ in ends]
    placed: list[float] = []
    for index in sorted(range(len(ends)), key=heights.__getitem__):
        height = max(heights[index], placed[-1] + gap) if placed else heights[index]
        placed.append(height)
        x, y, label = ends[index]
        axes.annotate(
            label, (x, y), xytext=(14, height - heights[index]), textcoords="offset points", va="center",
            color=colour(index), fontweight="bold", annotation_clip=False,
        )  # fmt: skip
