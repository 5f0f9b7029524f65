"""One task measured on one model: values of every sample, kept as JSON, before statistics."""

import hashlib
import importlib.metadata
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lm_eval.api.task
import numpy as np
from lm_eval.api import metrics
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate

from eval.tasks.lm_eval_adapter import HarnessModel
from eval.tasks.loading import LoadedTask

MEASURING = (__name__,)  # with all that it imports: what decides the numbers
MEAN, PERPLEXITY, WEIGHTED_PERPLEXITY, BITS = "mean", "perplexity", "weighted_perplexity", "bits_per_byte"
# How lm-eval makes one number of the samples' values: of these eval.tasks.scores gives intervals.
AGGREGATIONS = {
    metrics.mean: MEAN,
    metrics.perplexity: PERPLEXITY,
    metrics.weighted_perplexity: WEIGHTED_PERPLEXITY,
    metrics.bits_per_byte: BITS,
}


@dataclass(frozen=True)
class TaskSettings:
    """What decides a task's numbers besides model and data.

    Args:
        limit: most documents, the first ones; None for all.
        fewshot: examples before each question; None for the task's own number.
        window: as in eval.tasks.lm_eval_adapter.HarnessModel.
        refuse, add_bos_token: as there.
        seed: of few-shot examples and of sampled texts.
    """

    task: str
    limit: int | None
    fewshot: int | None
    window: int | None
    refuse: bool
    add_bos_token: bool
    precision: str
    row_tokens: int
    batch_tokens: int
    seed: int
    lm_eval: str = field(default_factory=lambda: importlib.metadata.version("lm_eval"))


@dataclass(frozen=True)
class Metric:
    """values: one a scored sample; pairs (log-likelihood, words or bytes) for weighted_perplexity and bits_per_byte.
    aggregation: a name of AGGREGATIONS' or of another function. value: of that function; None without values."""

    name: str
    aggregation: str
    higher_is_better: bool
    values: list[Any]
    value: float | None


@dataclass(frozen=True)
class TaskResult:
    """One task on one model.

    Args:
        group, length, source, data_hash, documents: as in LoadedTask.
        prompt_hash: sha256 of all that the model was asked.
        scored: ids of the documents that the metrics' values are of.
        too_long: ids of those that do not fit the window.
        chance: mean of 1 / choices, for multiple choice.
        texts: what the model wrote, for tasks that generate.
    """

    task: str
    group: str
    length: int | None
    source: str
    data_hash: str
    prompt_hash: str
    documents: int
    scored: list[int]
    too_long: list[int]
    chance: float | None
    metrics: list[Metric]
    texts: list[str] | None
    date: str
    seconds: float


def measure(loaded: LoadedTask, model: HarnessModel, settings: TaskSettings, date: str) -> TaskResult:
    """Runs lm-eval on one task.

    Raises:
        ValueError: a request that does not fit, with settings.refuse.
    """
    started = time.monotonic()
    random.seed(settings.seed)
    np.random.seed(settings.seed)  # some of lm-eval's tasks draw from the global generators
    task = loaded.task
    if settings.fewshot is not None:
        task.set_config("num_fewshot", settings.fewshot)
    elif task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(settings.seed)
    model.too_long.clear()
    with _without_bars():
        wanted: Any = {"tasks": {loaded.name: task}, "groups": {}, "group_map": {}}
        found = evaluate(model, wanted, limit=settings.limit, bootstrap_iters=0)
    samples = found["samples"][loaded.name]
    too_long = model.too_long[loaded.name]
    ids = [i for i in dict.fromkeys(sample["doc_id"] for sample in samples) if i not in too_long]
    generates = task.OUTPUT_TYPE == "generate_until"
    first = {sample["doc_id"]: sample for sample in reversed(samples)}  # one of each document, whatever the filters
    return TaskResult(
        task=loaded.name,
        group=loaded.group,
        length=loaded.length,
        source=loaded.source,
        data_hash=loaded.data_hash,
        prompt_hash=_prompt_hash([first[i] for i in sorted(first)]),
        documents=loaded.documents,
        scored=ids,
        too_long=sorted(too_long),
        chance=_chance([first[i] for i in ids]) if task.OUTPUT_TYPE == "multiple_choice" else None,
        metrics=_metrics(task, samples, too_long),
        texts=[first[i]["resps"][0][0] for i in ids] if generates else None,
        date=date,
        seconds=round(time.monotonic() - started, 2),
    )


@contextmanager
def _without_bars() -> Iterator[None]:
    """lm-eval shows a bar for each task that does not say which one; eval.tasks.evaluation has one over all tasks."""
    before = lm_eval.api.task.tqdm
    lm_eval.api.task.tqdm = lambda iterable, **_: iterable
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = before


def _prompt_hash(samples: Sequence[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr(sample["arguments"]).encode())
    return digest.hexdigest()


def _chance(samples: Sequence[dict[str, Any]]) -> float | None:
    return sum(1 / len(sample["arguments"]) for sample in samples) / len(samples) if samples else None


def _metrics(task: ConfigurableTask, samples: Sequence[dict[str, Any]], too_long: set[int]) -> list[Metric]:
    """Every metric and filter of a task, over the samples that fit; the filter is named where there are several."""
    aggregation, better = task.aggregation(), task.higher_is_better()
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    found = []
    for chosen in filters:
        of_filter = [sample for sample in samples if sample["filter"] == chosen]
        for name in of_filter[0]["metrics"]:
            if name not in aggregation:
                continue  # lm-eval reports no number for it either
            values = [sample[name] for sample in of_filter if sample["doc_id"] not in too_long]
            function = aggregation[name]
            found.append(
                Metric(
                    name=name if len(filters) == 1 else f"{name} ({chosen})",
                    aggregation=AGGREGATIONS.get(function, getattr(function, "__name__", "unknown")),
                    higher_is_better=bool(better.get(name, True)),
                    values=[_plain(value) for value in values],
                    value=float(function(values)) if values else None,
                )
            )
    return found


def _plain(value: Any) -> Any:
    """A value of numpy as one that JSON has."""
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value.item() if isinstance(value, np.generic) else value
