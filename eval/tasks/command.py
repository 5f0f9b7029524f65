"""Scores checkpoints on lm-eval's tasks and on RULER.

    python -m eval.tasks runs/a runs/b --tasks hellaswag piqa arc_easy --limit 40 --output runs/tasks
    python -m eval.tasks runs/a runs/b --tasks niah_single_1 vt --ruler runs/ruler --lengths 1024 --output runs/tasks

Offline (the default) there are the short tasks hellaswag, piqa, arc_easy, arc_challenge, winogrande, openbookqa, boolq,
sciq, commonsense_qa, social_iqa, lambada and mmlu. --source hub knows every task of lm-eval; --source FOLDER reads
FOLDER/TASK/SPLIT.jsonl. A sample that does not fit the window (--max_length: for rope the training length, for other
positions none) is left out and counted, or refused with --too_long refuse; nothing is cut. What was measured is kept
in OUTPUT/results and reused; the same command gives the same numbers.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import datasets

from common.command_line import CommandParser
from common.errors import run_command
from eval.common.options import KEPT, config_of
from eval.common.tracking import add_wandb_arguments, wandb_config
from eval.tasks.config import TasksConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one "error:" line on stderr."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        from eval.tasks.evaluation import evaluate
    except ModuleNotFoundError as error:
        package = str(error.name).split(".")[0]
        print(f"error: {package} is not installed: pip install -r requirements-eval.txt", file=sys.stderr)
        return 2

    def work(given: list[str]) -> list[str]:
        options = _parser().parse_args(given)
        config = config_of(TasksConfig, options)
        return evaluate(options.runs, Path(options.output), config, wandb_config(options), given)

    return run_command(work, arguments, stopped=KEPT)


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m eval.tasks", description=__doc__)
    parser.add_argument("runs", nargs="+", type=str, help="run folders, checkpoints or exports")
    parser.add_argument("--output", type=str, default="runs/tasks", help="folder of the tables")
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("--tasks", nargs="+", type=str, default=[], help="names of tasks and groups")
    parser.add_argument("--lengths", nargs="+", type=int, default=[], help="of the RULER tasks, in tokens")
    parser.add_class_arguments(TasksConfig, skip={"tasks", "lengths"})
    add_wandb_arguments(parser)
    return parser
