"""The command eval.tasks: the same numbers again, what is reused, left out and paired."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="needs pip install -r requirements-eval.txt")
import eval.tasks.evaluation
from eval.tasks.command import main
from eval.tasks.config import TasksConfig
from eval.tasks.report import score_rows, write_report
from eval.tasks.results import Metric, TaskResult
from eval.tasks.study import RunResult, Study
from eval.tasks.tables import study_tables
from eval.tasks.verdict import verdict
from tests.eval.common.olmo import needs_olmo
from tests.eval.conftest import BASE_LENGTH, tracked_tables
from tests.eval.reporting.pages import check_html
from tests.eval.tasks.conftest import RULER

SIX = ["arc_easy", "arc_challenge", "openbookqa", "sciq", "commonsense_qa", "piqa"]


def test_perplexities_are_compared_by_their_ratio(runs: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "local" / "lambada_openai"
    folder.mkdir(parents=True)
    rows = [
        {"text": f"class value import items {'self ' * i}range {word}"}
        for i, word in enumerate(["path", "x", "if", "for", "value"])
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--device", "cpu", "--tasks", "lambada", "--source", str(tmp_path / "local")]
    assert main([*runs, *options, "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out/tasks.json").read_text())
    row = next(row for row in report["scores"] if row["scores"][0]["metric"] == "perplexity")
    ours, theirs = row["scores"]
    values = [one["metrics"][0]["values"] for one in results(tmp_path / "out").values()]
    assert ours["value"] == pytest.approx(math.exp(-sum(values[0]) / 5)) and ours["interval"]["low"] < ours["value"]
    assert row["differences"][0]["ratio"] and row["differences"][1] is None
    assert row["differences"][0]["interval"]["value"] == pytest.approx(ours["value"] / theirs["value"])
    assert "times " in (tmp_path / "out/tasks.md").read_text()


def test_scores_and_differences_in_wandb(runs: list[str], local: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = ["--device", "cpu", "--tasks", "arc_easy", "--source", str(local), "--max_length", "128"]
    assert main([*runs, *options, "--output", str(output), "--wandb.mode", "offline"]) == 0
    tables = tracked_tables(output)
    assert set(tables) == {"scores", "differences"}
    report = json.loads((output / "tasks.json").read_text())
    expected = [(run, i, row) for row in report["scores"] for i, run in enumerate(["asentmax", "softmax"])]
    for found, (run, i, row) in zip(tables["scores"], expected, strict=True):
        score = row["scores"][i]
        assert (found["run"], found["task"], found["metric"]) == (run, "arc_easy", score["metric"])
        assert (found["samples"], found["left_out"], found["length"]) == (5, 1, None)
        assert [found["value"], found["value_low"]] == [score["value"], score["interval"]["low"]]
    for found, row in zip(tables["differences"], report["scores"], strict=True):
        interval = row["differences"][0]["interval"]
        assert (found["run"], found["baseline"], found["samples"], found["ratio"]) == ("asentmax", "softmax", 5, False)
        assert [found[f"difference{end}"] for end in ("", "_low", "_high")] == [
            interval[name] for name in ("value", "low", "high")
        ]


def test_a_group_and_its_tasks_are_each_tracked_once() -> None:
    metrics = [Metric("acc", "mean", True, [1.0, 0.0], 0.5)]
    tasks = [
        TaskResult(name, group, None, "", "", "", 3, [0, 1], [2], 0.25, metrics, None, "", 0.0)
        for name, group in (("piqa", "piqa"), ("mmlu_a", "mmlu"), ("mmlu_b", "mmlu"))
    ]
    run = RunResult("x", "", 1, {"attention": {"kind": "softmax"}}, 128, "", 8, "", tasks)
    study = Study([run], {"seed": 0}, 0.0, code_version="", command="", hardware="", date="")
    tables = study_tables(study, score_rows(study))
    assert [(row["task"], row["samples"], row["left_out"]) for row in tables["scores"]] == [
        ("piqa", 2, 1), ("mmlu (2 tasks together)", 4, 2), ("mmlu_a", 2, 1), ("mmlu_b", 2, 1),
        ("mean of 2 tasks", 6, 3),
    ]  # fmt: skip
    assert tables["differences"] == []


def study_of(scores: dict[str, dict[str, list[float]]], lengths: dict[str, int]) -> Study:
    """scores: run -> task -> values. The first two samples of each task have a perplexity beside."""
    runs = []
    for label, tasks in scores.items():
        results = []
        for task, values in tasks.items():
            metrics = [
                Metric("perplexity", "perplexity", False, [-1.0] * len(values), math.e),
                Metric("acc", "mean", True, values, sum(values) / len(values)),
            ]
            done = list(range(len(values)))
            length = lengths.get(task)
            results.append(TaskResult(task, task, length, "", "", "", 9, done, [], None, metrics, None, "", 0.0))
        kind = {"attention": {"kind": "softmax" if label == "soft" else "asentmax"}}
        runs.append(RunResult(label, "", 1, kind, 128, "", 8, "", results))
    return Study(runs, {"seed": 0, "limit": None}, 0.0, code_version="", command="", hardware="", date="")


def test_means_over_tasks_at_each_length(tmp_path: Path) -> None:
    """Every task counts alike; runs are compared on the samples that both have; one task alone has no mean."""
    scores = {
        "soft": {
            "a": [1.0, 0, 0, 0, 0, 0, 0, 0],
            "b": [1.0] * 6,
            "a_64": [1.0] * 5,
            "b_64": [0.0] * 5,
            "c_128": [1.0] * 9,
        },
        "ent": {"a": [1.0, 1, 0, 0, 0, 0, 0], "b": [1.0] * 6, "a_64": [0.2] * 5, "b_64": [0.0] * 5, "c_128": [1.0] * 9},
    }
    study = study_of(scores, {"a_64": 64, "b_64": 64, "c_128": 128})
    rows = score_rows(study)
    plain, long = rows.means
    assert [(row.task, row.length) for row in rows.means] == [("mean of 2 tasks", None), ("mean of 2 tasks", 64)]
    assert [score.value for score in plain.scores] == [(1 / 8 + 1) / 2, pytest.approx((2 / 7 + 1) / 2)]
    assert [score.samples for score in plain.scores] == [14, 13]
    against = next(one for one in plain.differences if one is not None)
    assert against.samples == 13 and against.interval.value == pytest.approx((2 / 7 - 1 / 7) / 2)
    assert [score.value for score in long.scores] == [0.5, pytest.approx(0.1)]
    write_report(study, rows, tmp_path)
    page = (tmp_path / "tasks.md").read_text()
    assert "ent is behind soft in the mean of 2 tasks at 64 tokens (by -40.0 %" in page
    assert "ent is level with soft in the mean of 2 tasks (by 7.1 %" in page
    assert "- mean of 2 tasks acc, 64 tokens: soft 50.0 %" in page and "| mean of 2 tasks | soft | 50.0 %" in page
    assert "no sample fits" not in page
    numbers = json.loads((tmp_path / "tasks.json").read_text())
    assert [row["length"] for row in numbers["means"]] == [None, 64]
    assert len(numbers["scores"]) == 10


def test_no_sample_fits() -> None:
    study = study_of({"soft": {"a": [1.0] * 5}}, {})
    task = replace(study.runs[0].tasks[0], scored=[], too_long=[0, 1], chance=0.25)
    task = replace(task, metrics=[replace(metric, values=[], value=None) for metric in task.metrics])
    study = replace(study, runs=[replace(study.runs[0], tasks=[task])])
    assert verdict(study.runs, score_rows(study)) == "no sample fits soft."


def results(folder: Path) -> dict[str, Any]:
    """What was measured, without dates and seconds."""
    found = {}
    for path in sorted((folder / "results").iterdir()):
        raw = json.loads(path.read_text())
        found[path.name] = {key: value for key, value in raw.items() if key not in ("date", "seconds")}
    return found


@needs_olmo
def test_twice_the_same_numbers_offline(
    runs: list[str], ruler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--device", "cpu", "--ruler", str(ruler), "--limit", "2", "--lengths", "1024"]
    tasks = ["--tasks", *SIX, *RULER]
    for name in ("first", "second"):
        assert main([*runs, *tasks, *options, "--output", str(tmp_path / name)]) == 0
    assert results(tmp_path / "first") == results(tmp_path / "second")
    reports = [json.loads((tmp_path / name / "tasks.json").read_text()) for name in ("first", "second")]
    assert reports[0]["scores"] == reports[1]["scores"] and reports[0]["settings"] == reports[1]["settings"]
    report = reports[0]
    assert report["baseline"] == "softmax" and report["lm_eval"] and report["code_version"]
    rows = {(row["task"], row["scores"][0]["metric"]): row for row in report["scores"]}
    assert {task for task, _ in rows} == {*SIX, "qa_squad_1024", "fwe_1024"}
    assert rows["arc_easy", "acc"]["chance"] == 0.25 and rows["piqa", "acc"]["chance"] == 0.5
    for row in rows.values():
        ours, theirs = row["scores"]
        assert ours["samples"] == theirs["samples"] == 2 and row["differences"][1] is None
        difference = row["differences"][0]
        assert difference["ratio"] is False and difference["samples"] == 2
        assert difference["interval"]["value"] == pytest.approx(ours["value"] - theirs["value"])
        assert ours["interval"]["low"] is None and ours["interval"]["units"] == 2
    page = (tmp_path / "first" / "tasks.md").read_text()
    assert "asentmax against softmax" in page and "Every sample fits the window" in page and "| 1,024 |" in page
    assert "python -m eval.tasks" in page and "asentmax is not told apart from softmax in 13 of 13 scores" in page
    html = check_html((tmp_path / "first" / "report.html").read_text())
    assert len(html.of("img")) == 1 and len(html.of("table")) >= 3

    def never(*arguments: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(eval.tasks.evaluation, "measure", never)
    capsys.readouterr()
    assert main([*runs, *tasks, *options, "--output", str(tmp_path / "first")]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("reusing") == 16 and "piqa acc_norm: asentmax " in printed.out
    with pytest.raises(AssertionError, match="measured again"):
        main([*runs, *tasks, *options[:-1], "2048", "--output", str(tmp_path / "first")])


def test_scores_are_of_the_samples_that_fit(
    runs: list[str], local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--device", "cpu", "--tasks", "arc_easy", "--source", str(local), "--output", str(tmp_path / "out")]
    assert main([*runs, *options]) == 0
    whole = results(tmp_path / "out")
    assert all(one["scored"] == list(range(6)) and one["too_long"] == [] for one in whole.values())
    assert all(one["chance"] == pytest.approx(1 / 3) for one in whole.values())
    assert main([*runs, *options, "--max_length", "128"]) == 0
    assert "asentmax, arc_easy: 1 of 6 samples do not fit 128 tokens and are left out" in capsys.readouterr().out
    cut = [one for name, one in results(tmp_path / "out").items() if name not in whole]
    for before, after in zip(whole.values(), cut, strict=True):
        assert after["scored"] == list(range(5)) and after["too_long"] == [5] and after["documents"] == 6
        for full, fitting in zip(before["metrics"], after["metrics"], strict=True):
            assert fitting["values"] == full["values"][:5]
    assert "5" in json.dumps(json.loads((tmp_path / "out/tasks.json").read_text())["scores"][0]["scores"])
    assert main([*runs, *options, "--max_length", "128", "--too_long", "refuse"]) == 2
    assert "task arc_easy, sample 5: " in capsys.readouterr().err
    assert main([*runs, *options, "--max_length", "2"]) == 0
    printed = capsys.readouterr().out
    assert "6 of 6 samples do not fit 2 tokens" in printed and "arc_easy acc: asentmax no sample fits" in printed


def test_examples_come_from_the_training_split(runs: list[str], local: Path, tmp_path: Path) -> None:
    options = ["--device", "cpu", "--tasks", "arc_easy", "--source", str(local)]
    assert main([runs[0], *options, "--output", str(tmp_path / "none")]) == 0
    for name in ("two", "again"):
        assert main([runs[0], *options, "--fewshot", "2", "--output", str(tmp_path / name)]) == 0
    none, two, again = (next(iter(results(tmp_path / name).values())) for name in ("none", "two", "again"))
    assert two == again and two["data_hash"] == none["data_hash"] and two["prompt_hash"] != none["prompt_hash"]


def test_one_bar_over_all_tasks(
    runs: list[str], local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (local / "arc_challenge").mkdir()
    (local / "arc_challenge" / "test.jsonl").write_text((local / "arc_easy" / "test.jsonl").read_text())
    options = ["--device", "cpu", "--tasks", "arc_easy", "arc_challenge", "--source", str(local)]
    assert main([*runs, *options, "--output", str(tmp_path / "out")]) == 0
    bars = [part for part in capsys.readouterr().err.replace("\n", "\r").split("\r") if "|" in part]
    assert all(
        any(name in bar for name in ("asentmax, arc_", "softmax, arc_")) or bar.startswith("  0%") for bar in bars
    )
    assert "softmax, arc_challenge: 100%" in bars[-1] and "4/4" in bars[-1]


def test_the_window_is_the_training_length_for_rope_alone(runs: list[str]) -> None:
    subject = eval.tasks.evaluation.find_subjects(runs[:1])[0]
    config = TasksConfig(tasks=["piqa"])
    choose: Callable[..., int | None] = eval.tasks.evaluation.choose_window
    assert choose(config, subject) is None  # nape
    assert choose(TasksConfig(tasks=["piqa"], max_length=77), subject) == 77
    subject.checkpoint.meta["model"]["positions"] = "rope"
    assert choose(config, subject) == BASE_LENGTH
