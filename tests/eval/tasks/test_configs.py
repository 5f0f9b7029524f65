"""The tasks that configs/eval names: offline ones as they are, online ones on stand-ins."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("lm_eval", reason="needs pip install -r requirements-eval.txt")
from eval.tasks.command import main
from eval.tasks.loading import load_tasks
from tests.eval.common.olmo import needs_olmo

CONFIGS = Path(__file__).parents[3] / "configs" / "eval"


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
