"""The figures of eval.sparse_frontier."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from eval.reporting.figures import COLOURS, MARKERS, PHONE_INCHES, STYLE, save_figure
from eval.reporting.statistics import Interval

PANELS_IN_A_ROW = 2  # on a phone each is readable, and the row scrolls
TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Point:
    """A value of one method. method: "dense" is drawn as a line across, "entmax" as a star."""

    label: str
    method: str
    density: float
    value: Interval


@dataclass(frozen=True)
class Panel:
    title: str
    axis: str
    points: Sequence[Point]
    log_y: bool = False


def in_rows(panels: Sequence[Panel], columns: int) -> list[list[Panel]]:
    """The last row is filled up with empty panels."""
    filled = [*panels, *[Panel("", "", [])] * (-len(panels) % columns)]
    return [filled[start : start + columns] for start in range(0, len(filled), columns)]


def over_density(rows: Sequence[Sequence[Panel]], path: Path) -> Path:
    """Values with 95 % intervals over density: a curve a policy, a star for entmax, a band for dense softmax."""
    with rc_context(STYLE):
        figure = Figure(figsize=(max(PHONE_INCHES, 3.6 * len(rows[0])), 1 + 3.1 * len(rows)))
        grid: Any = figure.subplots(len(rows), len(rows[0]), squeeze=False)
        for panels, axes_row in zip(rows, grid, strict=True):
            for panel, axes in zip(panels, axes_row, strict=True):
                _draw(axes, panel)
        handles: dict[str, Any] = {}
        for axes in grid.flat:
            handles |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=max(2, 2 * len(rows[0])), frameon=False
        )
        return save_figure(figure, path)


def _draw(axes: Axes, panel: Panel) -> None:
    if not panel.points:  # nothing was measured at this length
        axes.set_visible(False)
        return
    curves = list(dict.fromkeys(one.method for one in panel.points if one.method not in ("dense", "entmax")))
    for method in ("dense", *curves, "entmax"):
        points = sorted((one for one in panel.points if one.method == method), key=lambda one: one.density)
        if not points:
            continue
        if method == "dense":
            low, high = points[0].value.drawn
            if not math.isnan(low):
                axes.axhspan(low, high, color="#777777", alpha=0.15, linewidth=0)
            axes.axhline(points[0].value.value, color="#777777", linestyle="--", label=points[0].label)
            continue
        y = np.array([one.value.value for one in points])
        low_ends, high_ends = np.array([one.value.drawn for one in points]).T
        errors = [y - low_ends, high_ends - y]
        axes.errorbar(
            [one.density for one in points], y, yerr=np.maximum(errors, 0), capsize=3, label=points[0].label,
            **_style(method, curves),
        )  # fmt: skip
    axes.set_xscale("log")
    ticks = [tick for tick in TICKS if 0.7 * min(one.density for one in panel.points) <= tick]
    axes.set_xticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    if panel.log_y:
        axes.set_yscale("log")
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_ylim(-3, 103)
    axes.set(title=panel.title, xlabel="density (visible keys read)", ylabel=panel.axis)


def _style(method: str, curves: Sequence[str]) -> dict[str, Any]:
    if method == "entmax":
        return dict(color="#000000", marker="*", markersize=15, linestyle="none", zorder=5)
    index = curves.index(method)
    colours = len(COLOURS) - 1  # black is entmax's
    lines = ("-", ":")[index // colours % 2]
    return dict(color=COLOURS[index % colours], marker=MARKERS[index % len(MARKERS)], linestyle=lines, markersize=5)


def density_maps(maps: Mapping[str, Sequence[Sequence[float]]], path: Path) -> Path:
    """Density of every layer and head, one panel a method. maps: title -> (L, H)."""
    columns = min(3, len(maps))
    lines = -(-len(maps) // columns)
    with rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(max(PHONE_INCHES, 2.8 * columns), 0.6 + 2.5 * lines))
        grid: Any = figure.subplots(lines, columns, squeeze=False)
        for axes in grid.flat[len(maps) :]:
            axes.set_visible(False)
        image, highest = None, 100 * max(float(np.max(values)) for values in maps.values())
        for axes, (title, values) in zip(grid.flat, maps.items(), strict=False):
            image = axes.imshow(100 * np.array(values), vmin=0, vmax=highest, cmap="cividis", aspect="auto")
            axes.set_title(title, fontsize=10)
            axes.set(xlabel="head", ylabel="layer")
            axes.set_xticks(range(len(values[0])))
            axes.set_yticks(range(len(values)))
            axes.spines[:].set_visible(False)
        assert image is not None
        figure.colorbar(image, ax=grid, label="visible keys read (%)")
        return save_figure(figure, path)
