"""Tiny runs, RULER built for them, and documents of a task."""

import json
from pathlib import Path

import pytest

from data.tokenizer import load_tokenizer
from eval.ruler.command import RulerConfig, build
from tests.eval.conftest import MakeRun

RULER = ["qa_squad", "fwe"]


@pytest.fixture(scope="module")
def runs(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("runs")
    return [str(make_run(folder / kind, kind)) for kind in ("asentmax", "softmax")]


@pytest.fixture(scope="module")
def ruler(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ruler")
    config = RulerConfig(tasks=RULER, lengths=[1024, 2048], samples=2)
    build(load_tokenizer(corpus / "tokenizer.model"), None, config, folder)
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
