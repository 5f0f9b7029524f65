"""Every YAML that train.py takes is accepted, and what it sets arrives."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml

import train
from data.length_generalisation import TASKS, TaskConfig, TaskName, TaskSequences
from model.config import AttentionKind, config_from_dict

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
FILES = sorted(
    path
    for path in CONFIGS.rglob("*.yaml")
    if not path.name.startswith("prepare_") and path.parent.name != "eval"  # tests/eval/test_task_configs.py
)
BASE = ["models/smoke.yaml", "attention/asentmax.yaml", "data/stdlib.yaml", "smoke.yaml"]


def leaves(nested: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(nested, dict):
        return {prefix: nested}
    return {name: leaf for key, value in nested.items() for name, leaf in leaves(value, f"{prefix}.{key}").items()}


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What --print_config prints for these files."""

    def run(*files: Path) -> str:
        options = [option for file in files for option in ("--config", str(file))]
        monkeypatch.setattr(sys, "argv", ["train.py", *options, "--run_dir", "x", "--print_config"])
        monkeypatch.chdir(ROOT)
        with pytest.raises(SystemExit) as end:
            train.main()
        assert not end.value.code
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_train_takes_every_file(file: Path, resolved: Callable[..., str], tmp_path: Path) -> None:
    text = resolved(*(CONFIGS / name for name in BASE), file)
    printed = leaves(yaml.safe_load(text))
    for key, value in leaves(yaml.safe_load(file.read_text())).items():
        if key == ".data.sources":
            as_printed = json.loads(json.dumps(value[0]))  # keys of length_buckets become strings
            assert {name: printed[key][0][name] for name in as_printed} == as_printed
        else:
            assert printed[key] == value, key
    again = tmp_path / "resolved.yaml"
    again.write_text(text)
    assert leaves(yaml.safe_load(resolved(again))) == printed  # a run's config.yaml is a config


@pytest.mark.parametrize("kind", get_args(AttentionKind))
@pytest.mark.parametrize("task", TASKS)
def test_every_task_composes_with_every_attention(task: TaskName, kind: str, resolved: Callable[..., str]) -> None:
    names = [f"length_generalisation/{task}.yaml", f"attention/{kind}.yaml", "cluster/cpu.yaml"]
    config = yaml.safe_load(resolved(*(CONFIGS / name for name in names)))
    data, model = config["data"], config["model"]
    assert data["task"]["name"] == task and model["network"]["attention"]["kind"] == kind
    config_from_dict(model["network"])
    wanted = TaskConfig(**data["task"]).task
    assert model["network"]["vocab_size"] == wanted.vocab_size
    assert data["sequence_length"] == wanted.row_length(data["task"]["max_length"])
    rows = TaskSequences(TaskConfig(**data["task"]), data["sequence_length"], 0, "train")
    labelled = np.mean([(rows.sequence(i).labels >= 0).mean() for i in range(200)])
    assert config["trainer"]["gradient_clip_val"] == pytest.approx(labelled, rel=0.05)  # as the file's comment says


def test_the_small_form_holds_the_samples_of_the_tasks_it_names(resolved: Callable[..., str]) -> None:
    longest = 0
    for task in ("copy", "reverse", "sort", "flip_flop", "two_back"):
        names = (f"length_generalisation/{task}.yaml", "length_generalisation/small.yaml", "cluster/cpu.yaml")
        config = yaml.safe_load(resolved(*(CONFIGS / name for name in names)))
        assert config["data"]["task"]["name"] == task
        config_from_dict(config["model"]["network"])
        samples = TaskConfig(**config["data"]["task"])
        longest = max(longest, samples.task.row_length(samples.max_length))
        rows = TaskSequences(samples, config["data"]["sequence_length"], 0, "train")
        assert (rows.sequence(0).labels >= 0).any()
    assert config["data"]["sequence_length"] == longest


def test_folders_are_the_ones_that_readme_lists() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("configs/ "))
    listed = []
    for line in lines[start + 1 :]:
        if not line.startswith("  "):
            break
        listed.append(line.split()[0].rstrip("/"))
    assert sorted(path.name for path in CONFIGS.iterdir()) == sorted(listed)
