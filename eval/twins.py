"""Trains twins that differ in their attention only, each at its best learning rate, and compares them in one report.

    python -m eval.twins --kinds softmax asentmax --lrs 5e-4 1e-3 2e-3 --sweep_steps 1000 --seeds 0 1 \
        --data prepared/source-tree --output runs/twins -- \
        --config configs/models/30m.yaml --config configs/data/source_tree.yaml --config configs/stages/short.yaml \
        --config configs/cluster/one_gpu.yaml

What follows -- are train.py's options, the same for all twins; this command adds the attention (configs/attention),
--model.optimizer.lr, the seeds, --run_dir and --resume auto. With several learning rates each kind first trains
sweep_steps with each of them (OUTPUT/sweep/KIND-lr-X) and takes the one with the lowest validation loss; trials that
end before models copy from their context choose too high a rate for ASEntmax (RESULTS.md). Then every kind trains with
every seed (OUTPUT/KIND-seed-S). Twins of one seed see the same data in the same order. Run again, the command
continues where it stopped; OUTPUT/twins.json holds what was asked for and what was chosen.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from common.errors import run_command
from eval.config import EvalConfig
from eval.metrics import read_metrics
from eval.options import config_of
from eval.run import evaluate
from eval.tracking import add_wandb_arguments, wandb_config
from model.version import code_version

ROOT = Path(__file__).resolve().parents[1]
KINDS = tuple(sorted(path.stem for path in (ROOT / "configs" / "attention").glob("*.yaml")))
# train.py's exit codes (common/exits.py): the guard has given up; stopped by a signal with everything saved.
DIVERGED, INTERRUPTED = 65, 75
OWNED = ("--run_dir", "--resume", "--model.optimizer.lr", "--seed_everything", "--data.seed")
Train = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class TwinsConfig:
    """Which twins are trained.

    Args:
        kinds: files of configs/attention without .yaml.
        lrs: peak learning rates to choose from, for each kind; empty for that of the options.
        sweep_steps: optimizer steps of each trial; needed with two learning rates or more.
        seeds: of weights and data order; the sweep uses the first.
    """

    kinds: list[str] = field(default_factory=lambda: ["softmax", "asentmax"])
    lrs: list[float] = field(default_factory=list)
    sweep_steps: int = 0
    seeds: list[int] = field(default_factory=lambda: [0])

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"kinds is {self.kinds}: expected different ones of {', '.join(KINDS)}")
        if any(not (math.isfinite(lr) and lr > 0) for lr in self.lrs) or len(set(self.lrs)) < len(self.lrs):
            raise ValueError(f"lrs is {self.lrs}: expected different positive numbers")
        if len(self.lrs) > 1 and self.sweep_steps < 1:
            raise ValueError(
                f"sweep_steps is {self.sweep_steps}: expected at least 1, to choose among {len(self.lrs)} lrs"
            )
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {self.seeds}: expected different integers from 0 on")


class Stopped(Exception):
    """Training was interrupted with everything saved."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0; 2 after one "error:" line; 75 when training was interrupted and can be continued."""

    def work(given: list[str]) -> list[str]:
        own, options = split(given)
        parsed = _parser().parse_args(own)
        twins, measured = config_of(TwinsConfig, parsed.twins), config_of(EvalConfig, parsed.eval)
        output = Path(parsed.output)
        folders = [str(run) for run in train_twins(twins, options, output, run_training)]
        wandb = wandb_config(parsed)
        return evaluate(folders, Path(parsed.data), output / "report", measured, wandb, given, "eval.twins")

    try:
        return run_command(work, arguments)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return INTERRUPTED


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What stands before and behind "--". Raises ValueError where options of train.py are missing or not the user's."""
    if "--" not in arguments:
        raise ValueError("there is no -- among the arguments: train.py's options stand behind it (--help shows it)")
    own, options = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    for option in options:
        if (name := option.split("=")[0]) in OWNED or "configs/attention/" in option:
            raise ValueError(f"{name} stands behind --, but this command sets it for each twin: leave it out")
    return own, options


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m eval.twins", description=__doc__, exit_on_error=False)
    parser.add_argument("--data", type=str, required=True, help="prepared corpus with a heldout split")
    parser.add_argument("--output", type=str, required=True, help="folder of the runs and the report")
    for name, of in (("kinds", str), ("lrs", float), ("seeds", int)):
        parser.add_argument(f"--twins.{name}", f"--{name}", nargs="+", type=of, default=getattr(TwinsConfig(), name))
    parser.add_argument("--twins.sweep_steps", "--sweep_steps", type=int, default=0)
    parser.add_class_arguments(EvalConfig, "eval")
    add_wandb_arguments(parser)
    return parser


def train_twins(config: TwinsConfig, options: list[str], output: Path, train: Train) -> list[Path]:
    """Train all twins, as far as they are not trained yet.

    Args:
        options: of train.py, the same for all.
        train: runs train.py with options and returns its exit code.

    Returns:
        The run folders, the kinds of a seed next to each other.

    Raises:
        ValueError: OUTPUT belongs to another command, or a run failed.
        Stopped: a run was interrupted.
    """
    record = _open_record(output, {"twins": asdict(config), "options": options})
    for kind in config.kinds:
        if kind not in record["lr"]:
            record["lr"][kind], record["sweep"][kind] = _choose_lr(config, kind, options, output, train)
            _save_record(output, record)
    runs = []
    for seed in config.seeds:
        for kind in config.kinds:
            run = output / f"{kind}-seed-{seed}"
            code = train(_options(options, kind, record["lr"][kind], seed, run))
            if code:
                raise ValueError(f"training {run} ended with exit code {code}: see above, then run this command again")
            runs.append(run)
    return runs


def _choose_lr(
    config: TwinsConfig, kind: str, options: list[str], output: Path, train: Train
) -> tuple[float | None, dict[str, float | None]]:
    """The learning rate of the lowest validation loss, and the losses by learning rate (None: diverged)."""
    if len(config.lrs) < 2:
        return (config.lrs[0] if config.lrs else None), {}
    steps, losses = str(config.sweep_steps), {}
    for lr in config.lrs:
        run = output / "sweep" / f"{kind}-lr-{lr:g}"
        trial = ["--trainer.max_steps", steps, "--validation.every_n_steps", steps, "--checkpoint.every_n_steps", steps]
        code = train([*_options(options, kind, lr, config.seeds[0], run), *trial])
        if code not in (0, DIVERGED):
            raise ValueError(f"training {run} ended with exit code {code}: see above, then run this command again")
        losses[lr] = None if code else _validation_loss(run, config.sweep_steps)
        print(f"{kind} at learning rate {lr:g}: " + ("diverged" if losses[lr] is None else f"{losses[lr]:.4f}"))
    found = {lr: loss for lr, loss in losses.items() if loss is not None}
    if not found:
        raise ValueError(f"{kind} diverged at every learning rate of {config.lrs}: give smaller ones")
    best = min(found, key=lambda lr: found[lr])
    if best in (min(config.lrs), max(config.lrs)):
        print(f"{kind}: the best learning rate {best:g} is at the end of those tried: a wider range may be better")
    return best, {f"{lr:g}": loss for lr, loss in losses.items()}


def _validation_loss(run: Path, step: int) -> float | None:
    """val/loss at the sweep's last step; None where it is not finite."""
    series = read_metrics(run).get("val/loss")
    if series is None or series.steps[-1] != step:
        raise ValueError(f"{run} has no validation loss at step {step}: set data.val_sequences")
    return series.values[-1] if math.isfinite(series.values[-1]) else None


def _options(options: list[str], kind: str, lr: float | None, seed: int, run: Path) -> list[str]:
    rate = [] if lr is None else ["--model.optimizer.lr", repr(lr)]
    attention = ["--config", str(ROOT / "configs" / "attention" / f"{kind}.yaml")]
    seeds = ["--seed_everything", str(seed), "--data.seed", str(seed)]
    return [*attention, *options, *rate, *seeds, "--run_dir", str(run), "--resume", "auto"]


def run_training(options: Sequence[str]) -> int:
    """train.py's exit code. Raises Stopped when a signal has stopped it."""
    code = subprocess.run([sys.executable, str(ROOT / "train.py"), *options]).returncode
    if code == INTERRUPTED:
        raise Stopped(f"stopped with everything saved: the same command continues (exit code {INTERRUPTED})")
    return code


def _open_record(output: Path, asked: dict[str, Any]) -> dict[str, Any]:
    path = output / "twins.json"
    asked = json.loads(json.dumps(asked))
    if not path.is_file():
        record = {**asked, "code_version": code_version(), "lr": {}, "sweep": {}}
        _save_record(output, record)
        return record
    record = json.loads(path.read_text())
    for name in asked:
        if record[name] != asked[name]:
            raise ValueError(
                f"{path} was made with {name} {record[name]}, now it is {asked[name]}: repeat that command, or choose "
                "another --output"
            )
    return record


def _save_record(output: Path, record: dict[str, Any]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    pending = output / "twins.json.partial"
    pending.write_text(json.dumps(record, indent=2) + "\n")
    pending.rename(output / "twins.json")


if __name__ == "__main__":
    sys.exit(main())
