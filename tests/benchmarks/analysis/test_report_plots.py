"""Plots of an evaluation drawn anew from its report.json."""

import json
from pathlib import Path

import pytest

from benchmarks.analysis import report_plots
from common.files import write_json
from eval.held_out.report import write_report
from tests.eval.held_out.made_up import TWINS, study


def test_plots_are_those_of_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = study(TWINS)
    write_report(made, tmp_path)
    read = report_plots.read_study(tmp_path / "report.json")
    assert read == made
    (tmp_path / "loss.png").touch()
    assert report_plots.main([str(tmp_path / "report.json")]) == 0
    assert capsys.readouterr().out.splitlines() == [f"drew {tmp_path / 'loss.png'}"]
    assert (tmp_path / "loss.png").read_bytes() == (tmp_path / "plots" / "loss.png").read_bytes()


@pytest.mark.parametrize(
    ("change", "said"),
    [({"measurements": 3}, "measurements"), ({"stranger": 1}, "is no report of this version"), (None, "report.json")],
)
def test_what_is_no_report_is_named(
    change: dict[str, object] | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    if change is not None:
        write_report(study(TWINS[:1]), tmp_path)
        write_json(path, json.loads(path.read_text()) | change)
    assert report_plots.main([str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line
