"""Plots of results/: every one in RESULTS.md is drawn from numbers that stand beside it."""

import re
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

from benchmarks.analysis import method
from benchmarks.plots import RESULTS, draw, main, read_plot
from common.files import write_json

FILES = sorted(RESULTS.rglob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(RESULTS)))
def test_numbers_of_results_are_drawn(path: Path, tmp_path: Path) -> None:
    plot = read_plot(path)
    assert plot.lines and plot.source
    draw(plot, tmp_path / "plot.png")
    assert plt.imread(tmp_path / "plot.png").std() > 0
    assert path.with_suffix(".png").is_file()


def test_all_plots_of_the_first_page_have_numbers() -> None:
    text = (RESULTS.parent / "RESULTS.md").read_text()
    images = [RESULTS.parent / image for image in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)]
    assert len(images) == 4 and all(image.with_suffix(".json") in FILES for image in images)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"x_scale": "log3"}, "x_scale is 'log3': expected one of"),
     ({"lines": [{"name": "a", "x": [1.0, 2.0], "y": [1.0]}]}, "lists of [1, 2] points"),
     ({"source": None}, "source")],
)  # fmt: skip
def test_bad_numbers_are_named(
    change: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"title": "t", "x_label": "x", "y_label": "y", "source": "s", "lines": [{"name": "a", "x": [1], "y": [2]}]}
    write_json(tmp_path / "a.json", good | change)
    assert main([str(tmp_path / "a.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line and "a.json" in line


def test_the_method_is_drawn_from_what_is_computed(tmp_path: Path) -> None:
    weights = method.weights_of_one_query()
    kept = [int((one > 0).sum()) for one in weights.values()]
    assert kept[0] == method.N_KEYS and kept == sorted(kept, reverse=True)
    assert all(float(one.sum()) == pytest.approx(1, abs=1e-5) for one in weights.values())
    assert method.main([str(tmp_path / "m.png")]) == 0 and (tmp_path / "m.png").is_file()
