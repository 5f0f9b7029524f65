"""Whether an imported model scores in eval.tasks what its original scores in lm-eval's own `hf` model.

    python -m benchmarks.imported_tasks runs/smollm2 HuggingFaceTB/SmolLM2-135M --limit 500 --output results/imported

SOURCE is what the run was converted from. Both are float32; contexts begin with <bos> if the original's tokenizer puts
it there, which SmolLM2's does not. The table has each task's metrics by both and how many samples differ;
samples.json has every sample's value. Ends with code 1 where a sample differs.
"""

from common.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # the imports take seconds

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from common.arguments import PlainParser, a_path
from common.errors import user_errors
from common.files import write_json
from eval.common import provenance
from eval.common.scoring import Runtime
from eval.common.subjects import choose_device, find_subjects
from eval.generate import open_tokenizer
from eval.tasks.config import TasksConfig
from eval.tasks.lm_eval_adapter import HarnessModel
from eval.tasks.loading import LoadedTask, load_tasks
from eval.tasks.results import TaskResult, TaskSettings, measure
from model.hub.convert import Source, find_source, load_source
from model.loading import load_model

TASKS = ("hellaswag", "piqa", "arc_easy", "winogrande", "openbookqa", "sciq", "lambada", "boolq")
ROW_TOKENS, BATCH_TOKENS = 8192, 65536
EQUAL = 1e-3  # of a sample's log-likelihood in nats: float32's through tens of layers, over a passage


class Original(HFLM):
    """lm-eval's own model, with the attribute that eval.tasks.results.measure reads."""

    too_long: dict[str, set[int]] = defaultdict(set)


@dataclass(frozen=True)
class Row:
    """A metric of a task: its value by eval.tasks and by lm-eval's hf, samples, and how many of these differ."""

    task: str
    metric: str
    ours: float
    theirs: float
    samples: int
    differ: int


def compare(ours: TaskResult, theirs: TaskResult) -> list[Row]:
    """Both measured the same documents."""
    rows = []
    for mine, other in zip(ours.metrics, theirs.metrics, strict=True):
        assert mine.name == other.name and mine.value is not None and other.value is not None
        differ = sum(not _equal(x, y) for x, y in zip(mine.values, other.values, strict=True))
        rows.append(Row(ours.task, mine.name, mine.value, other.value, len(mine.values), differ))
    return rows


def _equal(x: Any, y: Any) -> bool:
    if isinstance(x, list):
        return all(_equal(a, b) for a, b in zip(x, y, strict=True))
    return math.isclose(x, y, rel_tol=0, abs_tol=EQUAL)


def original(source: Source, device: torch.device) -> Original:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.name, **source.options)
    model = load_source(source).to(device)
    return Original(model, tokenizer=tokenizer, batch_size=64, device=str(device), dtype=torch.float32)


def adds_bos(model: Original) -> bool:
    return bool(model.tok_encode("a")[0] == model.tokenizer.bos_token_id)


def imported(run: str, tokenizer: str | None, add_bos_token: bool, device: torch.device) -> HarnessModel:
    (subject,) = find_subjects([run])
    return HarnessModel(
        load_model(subject.checkpoint.path, device).model,
        open_tokenizer(subject.checkpoint, tokenizer),
        Runtime(device, None, ROW_TOKENS),
        window=subject.checkpoint.require(sequence_length=int)["sequence_length"],
        refuse=True,  # lm-eval's own model would cut it
        add_bos_token=add_bos_token,
        batch_tokens=BATCH_TOKENS,
        seed=0,
        label=subject.label,
    )


def measured(model: Any, tasks: Sequence[LoadedTask], limit: int | None) -> list[TaskResult]:
    found = []
    for task in tasks:
        settings = TaskSettings(task.name, limit, None, None, True, False, "float32", ROW_TOKENS, BATCH_TOKENS, 0)
        found.append(measure(task, model, settings, provenance.now()))
    return found


def table(rows: Sequence[Row]) -> list[str]:
    lines = ["| task | metric | eval.tasks | lm-eval hf | samples | that differ |", "|---|---|---|---|---|---|"]
    lines += [f"| {x.task} | {x.metric} | {x.ours:.4f} | {x.theirs:.4f} | {x.samples:,} | {x.differ} |" for x in rows]
    return lines


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = PlainParser(prog="python -m benchmarks.imported_tasks", description=__doc__)
    parser.add_argument("run", help="what model.hub.convert has made")
    parser.add_argument("source", help="what it was made of: a name on the hub, a folder or a GGUF file")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="of eval.tasks, with their data offline")
    parser.add_argument("--limit", type=int, default=None, help="documents of each task, the first ones")
    parser.add_argument("--tokenizer", default=None, help="where the run's has moved")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=a_path, default=None, help="a folder for README.md and samples.json")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    device, source = choose_device(options.device), find_source(options.source)
    config = TasksConfig(tasks=options.tasks, limit=options.limit)
    tasks = load_tasks(config.tasks, config.source, None, [], config.limit)
    other = original(source, device)
    ours = measured(imported(options.run, options.tokenizer, adds_bos(other), device), tasks, config.limit)
    theirs = measured(other, tasks, config.limit)
    rows = [row for pair in zip(ours, theirs, strict=True) for row in compare(*pair)]
    lines = table(rows)
    print("\n".join(lines))
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "README.md").write_text("\n".join(lines) + "\n")
        values = {
            name: {result.task: {metric.name: metric.values for metric in result.metrics} for result in results}
            for name, results in (("eval.tasks", ours), ("lm-eval hf", theirs))
        }
        write_json(options.output / "samples.json", values)
    return int(any(row.differ for row in rows))


if __name__ == "__main__":
    with user_errors():
        sys.exit(main(sys.argv[1:]))
