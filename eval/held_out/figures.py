"""Plots of an evaluation on held-out text, and of the training before it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eval.common.metrics import Series
from eval.held_out.analysis import NeedleScore, RunSummary
from eval.held_out.attention_profile import LayerProfile
from eval.reporting.figures import (
    MOST_TICKS,
    ONE_PANEL,
    PHONE_INCHES,
    STYLE,
    colour,
    label_ends,
    log_ticks,
    marker,
    plain_log_y,
    save_figure,
)


def loss_curves(metrics: Mapping[str, Mapping[str, Series]], path: Path) -> Path:
    """Training loss (thin: as logged; thick: running mean) and validation loss (markers) over optimizer steps."""
    with rc_context(STYLE):
        figure = Figure(figsize=ONE_PANEL)
        axes = figure.subplots()
        for index, (label, series) in enumerate(metrics.items()):
            train, validation = series.get("train/loss"), series.get("val/loss")
            if train is not None:
                axes.plot(train.steps, train.values, color=colour(index), alpha=0.25, linewidth=0.8)
                axes.plot(train.steps, _running_mean(train.values), color=colour(index), label=f"{label}, training")
            if validation is not None:
                axes.plot(
                    validation.steps, validation.values, color=colour(index), marker=marker(index), linestyle="--",
                    markeredgecolor="white", label=f"{label}, held-out",
                )  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(title="Loss while training", xlabel="optimizer step", ylabel="loss (nats per token)")
        plain_log_y(axes)
        axes.legend(frameon=False)
        return save_figure(figure, path)


def _running_mean(values: Sequence[float]) -> np.ndarray:
    width = max(1, len(values) // 30)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def perplexity_over_length(runs: Sequence[RunSummary], base_length: int, path: Path) -> Path:
    """Perplexity of the same tokens against context length, with 95 % intervals."""
    with rc_context(STYLE):
        figure = Figure(figsize=ONE_PANEL)
        axes = figure.subplots()
        for index, run in enumerate(runs):
            # A few percent apart, so that intervals of close models do not cover each other.
            shift = 1.03 ** (index - (len(runs) - 1) / 2)
            x = [score.tokens * shift for score in run.lengths]
            y = np.array([score.perplexity.value for score in run.lengths])
            low, high = np.array([score.perplexity.drawn for score in run.lengths]).T
            axes.errorbar(
                x, y, yerr=[y - low, high - y], color=colour(index), marker=marker(index), capsize=4, label=run.label
            )
        lengths = runs[0].lengths
        log_ticks(axes, [s.tokens for s in lengths], [f"{s.tokens:,}\n({s.multiple}x)" for s in lengths])
        axes.set(
            title="Perplexity over context length, same tokens",
            xlabel=f"context length in tokens (multiple of {base_length:,})",
            ylabel="perplexity per token",
        )
        axes.margins(x=0.06)
        plain_log_y(axes)
        label_ends(axes, [(s.tokens, s.perplexity.value, run.label) for run in runs for s in run.lengths[-1:]])
        return save_figure(figure, path)


def perplexity_by_position(runs: Sequence[RunSummary], training_lengths: Iterable[int], path: Path) -> Path:
    """Perplexity by position within the longest context, with 95 % bands and a line at each training length in it."""
    with rc_context(STYLE):
        figure = Figure(figsize=ONE_PANEL)
        axes = figure.subplots()
        for index, run in enumerate(runs):
            x = [(max(score.start, 1) * score.stop) ** 0.5 for score in run.positions]
            axes.plot(
                x, [s.perplexity.value for s in run.positions], color=colour(index), marker=marker(index),
                label=run.label,
            )  # fmt: skip
            low, high = np.array([s.perplexity.drawn for s in run.positions]).T
            axes.fill_between(x, low, high, color=colour(index), alpha=0.15, linewidth=0)
        ends = [score.stop for score in runs[0].positions]
        for length in sorted({one for one in training_lengths if one <= ends[-1]}):
            axes.axvline(length, color="#444444", linestyle=":", linewidth=1.4)
            axes.annotate(
                f"training length {length:,}", (length, 1), xycoords=("data", "axes fraction"), xytext=(-5, -4),
                textcoords="offset points", ha="right", va="top", color="#444444",
            )  # fmt: skip
        ticks = ends[:: -(-len(ends) // MOST_TICKS)]
        log_ticks(axes, ticks, [f"{tick:,}" for tick in ticks])
        axes.set(
            title="Perplexity by position in the longest context",
            xlabel="position in the context (tokens; ticks are ends of bins)",
            ylabel="perplexity per token",
        )
        plain_log_y(axes)
        label_ends(axes, [(s.stop, s.perplexity.value, run.label) for run in runs for s in run.positions[-1:]])
        return save_figure(figure, path)


def alpha_by_head(profiles: Mapping[str, Sequence[LayerProfile]], path: Path) -> Path:
    """Alpha of every head, one dot each, by layer; one panel a run."""
    with rc_context(STYLE):
        figure = Figure(figsize=(PHONE_INCHES, 0.6 + 2.8 * len(profiles)))
        panels = figure.subplots(len(profiles), 1, squeeze=False, sharey=True)[:, 0]
        for axes, (label, layers) in zip(panels, profiles.items(), strict=True):
            shortest = min(layer.multiple for layer in layers)
            for layer in (one for one in layers if one.multiple == shortest and one.alpha is not None):
                heads = np.array(layer.alpha)
                spread = np.linspace(-0.25, 0.25, len(heads)) if len(heads) > 1 else np.zeros(1)
                colours = colormaps["viridis"](np.linspace(0, 0.9, len(heads)))
                axes.scatter(layer.layer + spread, heads, c=colours, s=34, edgecolor="white", linewidth=0.5, zorder=3)
                for x, y, head in zip(layer.layer + spread, heads, range(len(heads)), strict=True):
                    if len(heads) <= 8:
                        axes.annotate(
                            str(head), (x, y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8
                        )
            axes.margins(y=0.12)  # for the heads' numbers
            axes.set(title=f"Alpha per head: {label}", xlabel="layer (dots: heads, left to right)", ylabel="alpha")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.ticklabel_format(axis="y", useOffset=False)
        return save_figure(figure, path)


def alpha_over_steps(metrics: Mapping[str, Mapping[str, Series]], path: Path) -> Path:
    """Alpha of every head while training, one line a head, coloured by layer; one panel a run."""
    with rc_context(STYLE):
        figure = Figure(figsize=(PHONE_INCHES, 0.6 + 2.8 * len(metrics)))
        panels = figure.subplots(len(metrics), 1, squeeze=False, sharey=True)[:, 0]
        for axes, (label, series) in zip(panels, metrics.items(), strict=True):
            layers = sorted({name.split("/")[1] for name in series})
            shades = dict(zip(layers, colormaps["viridis"](np.linspace(0, 0.9, len(layers))), strict=True))
            for name, one in series.items():
                layer = name.split("/")[1]
                first = name == min(other for other in series if other.split("/")[1] == layer)
                axes.plot(
                    one.steps, one.values, color=shades[layer], linewidth=1.2,
                    label=f"layer {int(layer.removeprefix('layer_'))}" if first else None,
                )  # fmt: skip
            axes.set(title=f"Alpha while training: {label}", xlabel="optimizer step", ylabel="alpha")
            axes.ticklabel_format(axis="y", useOffset=False)
            axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        return save_figure(figure, path)


@dataclass(frozen=True)
class LayerMeasure:
    """A row of panels: a value of each layer over context length.

    Args:
        value: of a layer, a mean over heads.
        dense: of weights spread evenly over all visible keys, by the context's tokens; None to leave it out.
    """

    title: str
    axis: str
    value: Callable[[LayerProfile], float]
    dense: Callable[[int], float] | None
    log_y: bool = False


SPARSITY = (
    LayerMeasure(
        "support size", "keys with weight, mean", lambda one: float(np.mean(one.support)),
        lambda size: (size + 1) / 2, log_y=True,
    ),
    LayerMeasure(
        "live tiles", "live 64x64 tiles (% of causal)", lambda one: 100 * float(np.mean(one.live_share)),
        lambda size: 100.0,
    ),
)  # fmt: skip
SPREAD = (
    LayerMeasure(
        "entropy", "entropy (nats), mean", lambda one: float(np.mean(one.entropy)),
        lambda size: float(np.mean(np.log(np.arange(1, size + 1)))),
    ),
    LayerMeasure(
        "sink", "weight on first tokens (%)", lambda one: 100 * float(np.mean(one.sink_share)),
        None,
    ),
)  # fmt: skip


def by_layer(
    profiles: Mapping[str, Sequence[LayerProfile]], measures: Sequence[LayerMeasure], base_length: int, path: Path
) -> Path:
    """Measures of every layer over context length: one column a run, one row a measure, one line a layer."""
    with rc_context(STYLE):
        figure = Figure(figsize=(max(PHONE_INCHES, 3.5 * len(profiles)), 3.1 * len(measures)))
        panels: Any = figure.subplots(len(measures), len(profiles), squeeze=False, sharex=True, sharey="row")
        for column, (label, layers) in enumerate(profiles.items()):
            for measure, axes in zip(measures, panels[:, column], strict=True):
                sizes = _layer_lines(axes, layers, measure, base_length)
                axes.set_title(f"{label}: {measure.title}")
                log_ticks(axes, sizes, [f"{size:,}" for size in sizes])
            panels[-1, column].set_xlabel("context length (tokens)")
        for measure, axes in zip(measures, panels[:, 0], strict=True):
            axes.set_ylabel(measure.axis)
            if measure.log_y:
                plain_log_y(axes)
            else:
                axes.set_ylim(bottom=0)
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(len(labels), 3 * len(profiles)), frameon=False
        )
        return save_figure(figure, path)


def _layer_lines(axes: Axes, layers: Sequence[LayerProfile], measure: LayerMeasure, base_length: int) -> list[int]:
    """Returns the context lengths in tokens."""
    sizes = [multiple * base_length for multiple in sorted({layer.multiple for layer in layers})]
    count = 1 + max(layer.layer for layer in layers)
    for index in range(count):
        shade = colormaps["viridis"](0.9 * index / max(1, count - 1))
        mine = sorted((one for one in layers if one.layer == index), key=lambda one: one.multiple)
        values = [measure.value(one) for one in mine]
        axes.plot(sizes, values, color=shade, marker=marker(index), markersize=5, label=f"layer {index}")
    if measure.dense is not None:
        dense = [measure.dense(size) for size in sizes]
        axes.plot(sizes, dense, color="#777777", linestyle="--", label="even over all visible keys")
    return sizes


def needle_heat_map(run: RunSummary, base_length: int, path: Path) -> Path:
    """Token accuracy by length and depth; chance stands in the title, exact matches in the cells."""
    cells = {(cell.multiple, cell.depth): cell for cell in run.needles if cell.depth is not None}
    multiples = sorted({multiple for multiple, _ in cells})
    depths = list(dict.fromkeys(depth for _, depth in cells))
    grid = np.array([[100 * cells[m, depth].token_accuracy.value for m in multiples] for depth in depths])
    with rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(PHONE_INCHES, 1.5 + 0.5 * len(depths)))
        axes = figure.subplots()
        image = axes.imshow(grid, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        for y, depth in enumerate(depths):
            for x, multiple in enumerate(multiples):
                _write_cell(axes, x, y, cells[multiple, depth], dark=grid[y, x] < 50)
        axes.set_xticks(range(len(multiples)), [f"{m * base_length:,}\n({m}x)" for m in multiples])
        axes.set_yticks(range(len(depths)), [f"{100 * float(depth or 0):g} %" for depth in depths])
        axes.tick_params(length=0)
        chance = f" (without needle {100 * run.chance.token_accuracy.value:.0f} %)" if run.chance else ""
        axes.set(
            title=f"Needle: {run.label}{chance}",
            xlabel=f"context length in tokens (multiple of {base_length:,})",
            ylabel="depth (0 %: start)",
        )
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=axes, label="value tokens right (%)")
        bar.outline.set_visible(False)
        return save_figure(figure, path)


def _write_cell(axes: Axes, x: int, y: int, cell: NeedleScore, dark: bool) -> None:
    exact = round(cell.exact_match.value * cell.samples)
    text = f"{100 * cell.token_accuracy.value:.0f} %\n{exact}/{cell.samples} exact"
    axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
