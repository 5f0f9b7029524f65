"""Tables on the terminal, CSV files, plots, and the density at which two lines of times cross."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import write_file

Row = Mapping[str, Any]


def crossing(shares: Sequence[float], ours: Sequence[float], peer: Sequence[float]) -> float | None:
    """Live share at which ours stops being faster than the peer, by linear interpolation of both times between the
    measured shares (in any order). inf where ours is faster at all of them, None where not even at the lowest."""
    points = sorted(zip(shares, ours, peer, strict=True))
    gaps = [mine - theirs for _, mine, theirs in points]  # negative: ours is faster
    if not gaps or gaps[0] >= 0:
        return None
    for (left, *_), (right, *_), a, b in zip(points, points[1:], gaps, gaps[1:], strict=False):
        if b >= 0:
            return left + (right - left) * a / (a - b)
    return math.inf


def interpolated(shares: Sequence[float], times: Sequence[float], share: float) -> float | None:
    """The time at a live share, linear between the measured ones (in any order); None outside of them."""
    points = sorted(zip(shares, times, strict=True))
    for (left, low), (right, high) in zip(points, points[1:], strict=False):
        if left <= share <= right:
            return low if left == right else low + (high - low) * (share - left) / (right - left)
    return None


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        if math.isnan(value):
            return "nan"
        small = value != 0 and abs(value) < 1e-2
        return f"{value:.1e}" if small else f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


class Report:
    """Prints the header, then what suites hand it. `folder`/SUITE.txt keeps the header and the suite's lines,
    `folder`/SUITE.csv its rows."""

    def __init__(self, folder: Path, header: Sequence[str]) -> None:
        self.folder, self._header = folder, list(header)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._widths: dict[str, int] = {}
        self.suite = ""
        self.rows: dict[str, list[dict[str, Any]]] = {}
        print("\n".join(self._header), flush=True)

    def line(self, text: str = "") -> None:
        print(text, flush=True)
        with (self.folder / f"{self.suite}.txt").open("a") as file:
            file.write(text + "\n")

    def start(self, suite: str, title: str, widths: Mapping[str, int]) -> None:
        """widths: the columns shown, with their widths in characters; the CSV has every key of the rows."""
        self.suite, self._widths = suite, dict(widths)
        self.rows[suite] = []
        (self.folder / f"{suite}.txt").write_text("".join(f"{line}\n" for line in self._header))
        self.line(f"\n## {suite}: {title}")
        self.line(self._joined({name: name for name in widths}))

    def add(self, row: Row) -> None:
        """Prints one row and writes the suite's CSV anew: a run that is cut short keeps what it measured."""
        rows = self.rows[self.suite]
        rows.append(dict(row))
        self.line(self._joined(row))
        write_csv(rows, self.folder / f"{self.suite}.csv")

    def _joined(self, row: Row) -> str:
        cells = []
        for name, width in self._widths.items():
            cell = _text(row.get(name))
            cells.append(cell.ljust(width) if isinstance(row.get(name), str) else cell.rjust(width))
        return "  ".join(cells).rstrip()


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Columns: every key, in the order in which they first appear. None becomes empty. The file is whole, or as it was
    before."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, table.getvalue().encode())


def plot_speed_up(rows: Sequence[Row], x: str, path: Path, title: str) -> Path:
    """Peers' times over ours, one line a peer, over `x`: "live %" or "T" (logarithmic). Rows as of the suites."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    from eval.reporting.figures import COLOURS, MARKERS, STYLE

    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.get("/ ours") is not None and row["implementation"] != "ours":
            lines.setdefault(row["implementation"], []).append((row[x], row["/ ours"]))
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 4.6))
        axes = figure.subplots()
        for index, (name, points) in enumerate(lines.items()):
            style: dict[str, Any] = dict(color=COLOURS[index % len(COLOURS)], marker=MARKERS[index % len(MARKERS)])
            axes.plot(*zip(*sorted(points), strict=True), label=f"over {name}", **style)
        axes.axhline(1, color="#444444", linestyle=":", linewidth=1.4)
        axes.set(title=title, ylabel="peer's time / ours (forward + backward)")
        if x == "T":
            ticks = sorted({row["T"] for row in rows})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel("tokens")
        else:
            axes.set_xlabel("live 64x64 tiles (% of causal)")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        figure.savefig(path)
    return path
