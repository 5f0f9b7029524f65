"""Plots of results/: every one in RESULTS.md is drawn from numbers that stand beside it."""

import re
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

from benchmarks.analysis import method
from benchmarks.plots import REPORT, RESULTS, draw, main, plot_files, read_plot
from common.files import write_json

FILES = plot_files()
COMPUTED = {"method/method.png"}  # by benchmarks.analysis.method, without a measurement


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


def test_every_picture_has_its_numbers_beside_it() -> None:
    pictures = {str(path.relative_to(RESULTS)): path for path in RESULTS.rglob("*.png")}
    without = {
        name for name, path in pictures.items()
        if not path.with_suffix(".json").is_file() and not (path.parent / REPORT).is_file()
    }  # fmt: skip
    assert without == COMPUTED and len(pictures) > 10


def test_every_picture_is_shown_and_its_page_names_the_command() -> None:
    for path in RESULTS.rglob("*.png"):
        page = (path.parent / "README.md").read_text()
        assert f"]({path.name})" in page or path.name == "needles.png", path
        command = "analysis.method" if path.name == "method.png" else "benchmarks.plots"
        command = "analysis.report_plots" if (path.parent / REPORT).is_file() else command
        assert f"python -m benchmarks.{command.removeprefix('benchmarks.')}" in page, path


@pytest.mark.parametrize(
    ("change", "message"),
    [({"x_scale": "log3"}, "x_scale is 'log3': expected one of"),
     ({"y_scale": "log2"}, "y_scale is 'log2': expected one of"),
     ({"y_scale": "log", "lines": [{"name": "a", "x": [1.0], "y": [0.0]}]}, "has y 0.0: expected above 0"),
     ({"x_scale": "log2", "lines": [{"name": "a", "x": [0.0], "y": [1.0]}]}, "has x 0.0: expected above 0"),
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
