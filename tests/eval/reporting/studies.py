"""Reports of made-up numbers, of every command that writes a page."""

from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data.length_generalisation import TaskConfig
from eval.held_out import report as held_out
from eval.length_generalisation import report as length_generalisation
from eval.length_generalisation.measure import LengthResult
from eval.sparse_frontier import report as sparse_frontier
from eval.sparse_frontier.config import PHASES, Cell, PrefillTime
from eval.sparse_frontier.config import Study as SparseStudy
from model.config import AttentionConfig, ModelConfig
from tests.eval.held_out.made_up import TWINS, study

LABEL = "asentmax-30m-learning-rate-0.001-seed-0"
FACTS = {"code_version": "abc", "command": f"python -m eval.x runs/{LABEL}", "hardware": "test", "date": "2026-01-01"}


def write_pages(folder: Path) -> dict[str, Path]:
    """The page by the command's name."""
    pages = {
        "run": held_out.write_report(study(TWINS), folder / "run")[0],
        "length_generalisation": lengths(folder / "length_generalisation"),
        "sparse_frontier": sparse(folder / "sparse_frontier"),
    }
    return pages | ({"tasks": tasks(folder / "tasks")} if find_spec("lm_eval") else {})


def lengths(folder: Path) -> Path:
    runs = []
    for name, task in (("sort", TaskConfig("sort")), ("reverse", TaskConfig("reverse"))):
        for kind, rights in (("asentmax", (100, 91, 0)), ("softmax", (100, 1, 0))):
            model = asdict(ModelConfig(vocab_size=36, attention=AttentionConfig(kind=kind)))  # type: ignore[arg-type]
            found = [
                LengthResult(64 * n, n, 100, right, 64 * right, 6400 * n, "test", "2026-01-01", 1.0)
                for n, right in zip((1, 2, 4), rights, strict=True)
            ]
            facts: dict[str, Any] = {"precision": "float32", "trained_with": "abc", "lengths": found}
            runs.append(length_generalisation.RunResult(f"{name}-{kind}", "x", 25_000, 25_000, 0, task, model, **facts))
    made = length_generalisation.Study(runs, {"samples": 100, "seed": 0}, **FACTS)
    return length_generalisation.write_report(made, folder)[0]


def sparse(folder: Path) -> Path:
    cells, documents = [], 6
    ways = [("dense", None, 1.0, 1.0), ("entmax", None, 0.1, 0.97), ("window", 0.1, 0.1, 1.2), ("quest", 0.5, 0.5, 1.1)]
    for phase in PHASES:
        for multiple in (1, 4):
            for method, wanted, density, scale in ways:
                needles = [(4 if method == "entmax" else 1, 6)] * 8
                loss = [scale * (2 + 0.1 * i) * 1000 for i in range(documents)]
                cells.append(
                    Cell(
                        LABEL, method, phase, multiple, 4096 * multiple, wanted, "window(1024)" if wanted else "",
                        [[density, density / 2]] * 2, [[density, density]] * 2, None, loss, [1000] * documents, needles,
                        {"multi_value": needles}, [] if wanted else needles, "test", "2026-01-01", 1.0,
                    )
                )  # fmt: skip
    times = [PrefillTime(LABEL, method, 4096, None, "", [0.014, 0.015, 0.013]) for method in ("dense", "entmax")]
    made = SparseStudy(
        cells, [], times, {"seed": 0}, 4096, documents, [LABEL, "softmax-30m"], "prepared/x", "f" * 64,
        {LABEL: "float32"}, [], **FACTS,
    )  # fmt: skip
    return sparse_frontier.write_report(made, sparse_frontier.summarise(made), folder)[0]


def tasks(folder: Path) -> Path:
    from eval.tasks.report import score_rows, write_report

    made = task_study({"asentmax": 0.9, "softmax": 0.3})
    return write_report(made, score_rows(made), folder)[0]


def task_study(right: dict[str, float]) -> Any:
    """A study of two tasks of lm-eval, one of them a group's only one, and RULER at two lengths; 40 samples each.

    Args:
        right: of each run, the share of its samples that are right.
    """
    from eval.tasks.results import Metric, TaskResult
    from eval.tasks.study import RunResult, Study

    def result(task: str, length: int | None, chance: float | None, share: float) -> TaskResult:
        values = [float(i < 40 * share) for i in range(40)]
        metric = Metric("acc", "mean", True, values, share)
        return TaskResult(
            task, task.split("@")[0], length, "hub", "d", "p", 40, list(range(40)), [], chance, [metric], None, "", 0.0
        )

    names = [("arc_easy", None, 0.25), ("piqa", None, 0.5), ("vt@1024", 1024, None), ("vt@2048", 2048, None)]
    runs = [
        RunResult(label, f"runs/{label}", 5, {"attention": {"kind": label}}, 4096, "abc", None, "float32",
                  [result(*name, share) for name in names])
        for label, share in right.items()
    ]  # fmt: skip
    return Study(runs, {"limit": None, "seed": 0}, seconds=1.0, **FACTS)
