"""RULER's numbers in the report of the comparison of policies with the entmax twin."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import eval.sparse_frontier.ruler_report
from eval.reporting.document import Table
from eval.reporting.statistics import paired_shares, share
from eval.sparse_frontier.config import RulerCell, Study
from eval.sparse_frontier.report import summarise
from eval.sparse_frontier.ruler_report import ruler_blocks, ruler_lines, ruler_panel, summarise_ruler
from eval.sparse_frontier.tables import study_tables

NOWHERE = {"code_version": "", "command": "", "hardware": "", "date": ""}


def ruler_cell(method: str, task: str, scores: list[float], wanted: float | None = None) -> RulerCell:
    density = {"dense": 1.0, "entmax": 0.2, "window": 0.5 + 0.1 * (task == "vt")}[method]
    return RulerCell("x", method, "decode", 4, 512, wanted, "", task, "", density, scores, [], "", "", 0.0)


def test_tasks_count_alike_and_differences_are_paired() -> None:
    cells = [
        ruler_cell("dense", "vt", [1, 1, 0.5, 0.25]), ruler_cell("dense", "cwe", [1, 0, 0, 1]),
        ruler_cell("window", "vt", [1, 0.75, 0.5, 0.25], 0.5), ruler_cell("window", "cwe", [0, 0, 0, 0], 0.5),
        ruler_cell("entmax", "vt", [1, 1, 1, 1]), ruler_cell("entmax", "cwe", [1, 1, 1, 1]),
    ]  # fmt: skip
    settings = {"seed": 3}
    study = Study([], cells, [], settings, 128, 2, [], "", "", {}, [], **NOWHERE)
    dense, window, entmax = summarise_ruler(study)
    assert dense.accuracy == share((2.75 / 4 + 0.5) / 2, 8) and dense.tasks["cwe"] == share(0.5, 4)
    assert window.accuracy.value == pytest.approx((0.625 + 0) / 2) and window.samples == 8
    assert window.difference.value == pytest.approx(window.accuracy.value - dense.accuracy.value)
    assert window.difference.low is not None and window.difference.high is not None
    assert window.difference.low < window.difference.value < window.difference.high
    assert entmax.accuracy == share(1.0, 8) and entmax.tasks == {"vt": share(1.0, 4), "cwe": share(1.0, 4)}
    ours, theirs = (cells[i].scores + cells[i + 1].scores for i in (4, 0))
    assert entmax.difference == paired_shares(ours, theirs) and entmax.tasks["vt"].low is None  # of 4 samples
    equal = [replace(one, scores=[1.0] * 4) for one in cells[:4]]
    same = summarise_ruler(replace(study, ruler=equal))[1].difference  # eight samples prove no equality
    assert same.value == 0 and same.low is not None and same.low < -0.2
    panel = ruler_panel([dense, window, entmax], 4)
    assert [(one.method, one.density) for one in panel.points] == [("dense", 1.0), ("window", 0.55), ("entmax", 0.2)]
    assert panel.points[1].value.value == pytest.approx(31.25) and panel.title == "512 tokens: RULER, mean of 2 tasks"
    assert not ruler_panel([dense], 1).points and window.densities == {"vt": 0.6, "cwe": 0.5}
    tables = study_tables(study, summarise(study))
    row = tables["ruler"][1]
    assert [row[name] for name in ("method", "wanted", "tasks", "samples", "density")] == ["window", 0.5, 2, 8, 0.55]
    assert row["accuracy_low"] == window.accuracy.low and row["difference"] == window.difference.value
    rows = [(one["method"], one["task"], one["density"], one["samples"]) for one in tables["ruler_tasks"]]
    assert rows[2:4] == [("window", "vt", 0.6, 4), ("window", "cwe", 0.5, 4)]
    assert tables["ruler_tasks"][3]["accuracy"] == 0 and tables["cells"] == []


def test_every_task_is_drawn_at_its_own_density(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tasks = ["vt", "cwe", "fwe", "qa_squad", "niah_single_1"]
    cells = [ruler_cell(method, task, [1, 0]) for method in ("dense", "window", "entmax") for task in tasks]
    cells = [replace(one, wanted=0.5) if one.method == "window" else one for one in cells]
    longer = [replace(one, multiple=8, context=1024) for one in cells if one.task == "cwe"]
    settings = {"seed": 0}
    study = Study([], [*cells, *longer], [], settings, 128, 2, [], "", "", {}, [], **NOWHERE)
    drawn: list[Any] = []

    def keep(rows: Any, path: Path) -> Path:
        drawn.append(rows)
        return path

    monkeypatch.setattr(eval.sparse_frontier.ruler_report, "over_density", keep)
    summaries = summarise_ruler(study)
    blocks = ruler_blocks(summaries, "decode", tmp_path)
    rows = [[panel.title.split(": ")[-1] for panel in row] for row in drawn[0]]
    assert rows == [tasks[:2], tasks[2:4], [tasks[4], ""], ["cwe", ""]]
    assert drawn[0][3][0].title == "1,024 tokens: cwe"
    assert [point.density for panel in drawn[0][0][:2] for point in panel.points] == [1, 0.6, 0.2, 1, 0.5, 0.2]
    tables = [block for block in blocks if isinstance(block, Table)]
    assert [table.header[5:] for table in tables] == [tasks, ["cwe"]]
    assert tables[0].rows[1][:4] == ["sliding window", "50 %", "52 %", "50 % [19, 81]"]
    assert tables[0].rows[0][4] == "" and tables[0].rows[1][4] == "0 % [-27, 27]"
    lines = ruler_lines(summaries)
    assert [line.split(": ")[0] for line in lines] == [
        "decode, 512 tokens, RULER (5 tasks)", "decode, 1,024 tokens, RULER (1 task)",
    ]  # fmt: skip
    assert "window" not in lines[0]  # it reads more than entmax
    assert ruler_blocks([], "decode", tmp_path) == [] and ruler_lines([]) == []
