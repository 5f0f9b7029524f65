"""The plot of eval.tasks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from eval.reporting.figures import PHONE_INCHES, STYLE, colour, marker, save_figure
from eval.reporting.statistics import Interval
from eval.tasks.study import Row


def scores_by_task(rows: Sequence[Row], labels: Sequence[str], path: Path) -> Path:
    """Scores in % with 95 % intervals, a line for each row, a mark for each run; grey: chance. rows: their scores are
    shares. labels: of the runs."""
    with rc_context(STYLE):
        figure = Figure(figsize=(PHONE_INCHES, 1.2 + (0.16 + 0.16 * len(labels)) * len(rows)))
        axes = figure.subplots()
        for i, label in enumerate(labels):
            shift = 0.6 * ((i + 0.5) / len(labels) - 0.5)
            places = [y + shift for y, row in enumerate(rows) if row.scores[i].interval is not None]
            found = [_percent(interval) for row in rows if (interval := row.scores[i].interval) is not None]
            x = np.array([interval.value for interval in found])
            low, high = np.array([interval.drawn for interval in found]).reshape(-1, 2).T
            axes.errorbar(
                x, places, xerr=np.maximum([x - low, high - x], 0), color=colour(i), marker=marker(i), linestyle="none",
                capsize=2, label=label,
            )  # fmt: skip
        chances = [(100 * row.chance, y) for y, row in enumerate(rows) if row.chance is not None]
        if chances:
            x, places = np.array(chances).T
            axes.vlines(x, places - 0.4, places + 0.4, color="#777777", linestyle="--", label="chance")
        axes.set_yticks(range(len(rows)), [f"{row.task}\n{row.scores[0].metric}" for row in rows], fontsize=8)
        axes.set(xlim=(-2, 102), ylim=(len(rows) - 0.4, -0.6), xlabel="score (%)", title="Scores by task")
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        return save_figure(figure, path)


def _percent(interval: Interval) -> Interval:
    return interval.map(lambda value: 100 * value)
