"""Plots of tasks that were trained short and scored long."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from eval.reporting.figures import PHONE_INCHES, STYLE, colour, log_ticks, marker, save_figure
from eval.reporting.statistics import Interval


@dataclass(frozen=True)
class Curve:
    """Shares over multiples of the training length, coloured by `family`; a reference is a published one."""

    label: str
    family: str
    points: list[tuple[float, Interval]]
    reference: bool


def exact_match_over_length(panels: Mapping[str, Sequence[Curve]], path: Path) -> Path:
    """Exact match in % over multiples of the training length, one panel a task, bands where there are intervals."""
    with rc_context(STYLE):
        figure = Figure(figsize=(PHONE_INCHES, 0.6 + 3.6 * len(panels)))
        rows = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axes, (title, curves) in zip(rows, panels.items(), strict=True):
            families = list(dict.fromkeys(curve.family for curve in curves))
            for index, curve in enumerate(curves):
                shade = colour(families.index(curve.family))
                x = [multiple for multiple, _ in curve.points]
                y = [100 * interval.value for _, interval in curve.points]
                low, high = 100 * np.array([interval.drawn for _, interval in curve.points]).T
                axes.plot(
                    x, y, color=shade, marker=marker(index), label=curve.label, clip_on=False,
                    linestyle="--" if curve.reference else "-", alpha=0.6 if curve.reference else 1.0,
                )  # fmt: skip
                if not curve.reference:
                    axes.fill_between(x, low, high, color=shade, alpha=0.15, linewidth=0)
            multiples = sorted({multiple for curve in curves for multiple, _ in curve.points})
            log_ticks(axes, multiples, [f"{multiple:g}x" for multiple in multiples])
            axes.set(title=title, ylabel="exact match (%)", ylim=(0, 100))
            axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
        rows[-1].set_xlabel("length (multiple of the longest training length)")
        return save_figure(figure, path)
