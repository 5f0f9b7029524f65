"""Trains twins that differ in their attention only, each at its best learning rate, and compares them in one report.

    python -m eval.twins --kinds softmax asentmax --lrs 5e-4 1e-3 2e-3 --sweep_steps 1000 --seeds 0 1 \
        --data prepared/source-tree --output runs/twins -- \
        --config configs/models/30m.yaml --config configs/data/source_tree.yaml --config configs/stages/short.yaml \
        --config configs/cluster/one_gpu.yaml

What follows -- are train.py's options, the same for all twins; this command adds the attention (configs/attention),
--model.optimizer.lr, the seeds, --run_dir and --resume auto. With several learning rates each kind first trains
sweep_steps with each of them (OUTPUT/sweep/KIND-lr-X) and takes the one with the lowest validation loss; trials that
end before models copy from their context choose too high a rate for ASEntmax (results/quality). Then every kind trains
with every seed (OUTPUT/KIND-seed-S). Twins of one seed see the same data in the same order. Run again, the command
continues where it stopped; Ctrl-C, SIGTERM and SIGUSR1 let the training at hand save first (exit code 75).
OUTPUT/twins.json holds what was asked for and what was chosen. OUTPUT/report compares the twins.

A second -- begins the options of a stage that goes on from each twin's weights (--init_from), with its own learning
rate, as extending the context does: -- ... -- --config configs/stages/extend_32k.yaml ... --model.optimizer.lr 3e-4
makes OUTPUT/KIND-seed-S-stage2 and OUTPUT/report-stage2. More stages may follow.
"""

from common.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # the imports take seconds

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from common.command_line import CommandParser
from common.errors import UsageError, run_command
from common.exits import DIVERGED
from common.files import read_json, write_json
from common.locks import folder_lock
from data.store import TokenStore
from eval.common.metrics import read_metrics
from eval.common.options import KEPT, check_output, config_of
from eval.common.subjects import Subject, choose_device
from eval.common.tracking import add_wandb_arguments, wandb_config
from eval.common.training import Stopped, check_code, run_training, settings_of
from eval.held_out.config import EvalConfig
from eval.held_out.texts import open_held_out
from eval.run import evaluate
from model.checkpoint import CheckpointInfo, resolve_checkpoint
from model.config import config_from_dict
from model.policies.thresholds import read_thresholds
from model.transfer import unlike_weights
from model.version import code_version

ROOT = Path(__file__).resolve().parents[1]
KINDS = tuple(sorted(path.stem for path in (ROOT / "configs" / "attention").glob("*.yaml")))
OWNED = ("--run_dir", "--resume", "--seed_everything", "--data.seed", "--model.network.attention.kind")
Train = Callable[[Sequence[str]], int]
TrainOne = Callable[[str, int, Path], int]


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
        inside = all(0 <= seed < 2**32 for seed in self.seeds)  # train.py's --seed_everything takes no others
        if not self.seeds or not inside or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {self.seeds}: expected different integers from 0 on, below {2**32}")


class TwinsEvalConfig(EvalConfig):
    """What is measured once they are trained."""

    @staticmethod
    def option(name: str) -> str:
        return f"--eval.{name}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0; 2 after one "error:" line; 75 when training was interrupted and can be continued."""

    def work(given: list[str]) -> list[str]:
        if {"-h", "--help"} & set(given[: given.index("--")] if "--" in given else given):
            _parser().parse_args(["--help"])  # ends here
        own, stages = split(given)
        parsed = _parser().parse_args(own)
        twins, measured = config_of(TwinsConfig, parsed.twins), config_of(TwinsEvalConfig, parsed.eval)
        output, data, wandb = Path(parsed.output), Path(parsed.data), wandb_config(parsed)
        check_output(output)
        with folder_lock(output, f"--output {output} is in use by another eval.twins: wait for it, or choose another"):
            check_before_training(twins, stages, output, data, measured)
            lines: list[str] = []
            for number, options in enumerate(stages, 1):
                train = train_twins if number == 1 else partial(train_on, number)
                folders = [str(run) for run in train(twins, options, output, run_training)]
                report = output / ("report" + _suffix(number))
                lines += evaluate(folders, data, report, measured, wandb, given, "eval.twins")
            return lines

    try:
        return run_command(work, arguments, stopped=KEPT)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.code


def split(arguments: list[str]) -> tuple[list[str], list[list[str]]]:
    """What stands before the first "--", and behind each the options of a stage. Raises ValueError where options of
    train.py are missing or not the user's."""
    if "--" not in arguments:
        raise ValueError("there is no -- among the arguments: train.py's options stand behind it (--help shows it)")
    groups: list[list[str]] = [[]]
    for argument in arguments:
        if argument == "--":
            groups.append([])
        else:
            groups[-1].append(argument)
    own, *stages = groups
    for number, options in enumerate(stages, 1):
        if number > 1 and not options:
            raise ValueError(
                f"nothing stands behind -- number {number}: give the options of that stage, or leave it out"
            )
        owned = (*OWNED, "--model.optimizer.lr" if number == 1 else "--init_from")
        for option in options:
            if (name := option.split("=")[0]) in owned or "configs/attention/" in option:
                raise ValueError(f"{name} stands behind --, but this command sets it for each twin: leave it out")
    return own, stages


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m eval.twins", description=__doc__)
    parser.add_argument("--data", type=str, required=True, help="prepared corpus with a heldout split")
    parser.add_argument("--output", type=str, required=True, help="folder of the runs and the report")
    for name, of in (("kinds", str), ("lrs", float), ("seeds", int)):
        parser.add_argument(f"--twins.{name}", f"--{name}", nargs="+", type=of, default=getattr(TwinsConfig(), name))
    parser.add_argument("--twins.sweep_steps", "--sweep_steps", type=int, default=0)
    parser.add_class_arguments(EvalConfig, "eval")
    add_wandb_arguments(parser)
    return parser


def check_before_training(
    config: TwinsConfig, stages: list[list[str]], output: Path, data: Path, measured: EvalConfig
) -> None:
    """All that can be known before hours of training: that the twins can be compared on `data`, and go on in `output`.

    Raises: ValueError, FileNotFoundError: what does not fit, and the way out.
    """
    choose_device(measured.device)
    if measured.thresholds is not None:
        read_thresholds(Path(measured.thresholds))
    _check_stages(_open_record(output, config, stages[0]), output, stages)
    first, numbers = config.kinds[0], range(1, len(stages) + 1)
    # train.py takes seconds to say it
    settings = cache(lambda kind, number: _settings(config, stages[number - 1], output, kind, number))
    for kind in config.kinds if len(stages) > 1 else ():
        _check_networks([settings(kind, number)["model"]["network"] for number in numbers])
    for number in numbers:
        run = _run(output, first, config.seeds[0], number)
        try:
            twin = resolve_checkpoint(run)
        except FileNotFoundError:  # not trained yet
            twin = CheckpointInfo(run, 0, _planned(config, settings(first, number)["data"], number))
        open_held_out(data, [Subject(run.name, twin)], measured)


def _check_stages(record: dict[str, Any], output: Path, stages: list[list[str]]) -> None:
    """Raises ValueError where a later stage that was trained in `output` is now another one."""
    for number, (trained, asked) in enumerate(zip(record.get("later", []), stages[1:], strict=False), 2):
        if trained != asked:
            raise ValueError(
                f"{_record(output)}: behind -- number {number} stood {trained}, now it is {asked}: repeat those "
                "options (further stages may follow), or choose another --output"
            )


def _settings(config: TwinsConfig, options: list[str], output: Path, kind: str, number: int) -> dict[str, Any]:
    """What train.py makes of the options of a kind's first twin in this stage. Raises UsageError."""
    seed, lr = config.seeds[0], config.lrs[0] if config.lrs and number == 1 else None
    return settings_of(_options(options, kind, lr, seed, _run(output, kind, seed, number)))


def _check_networks(networks: list[dict[str, Any]]) -> None:
    """Raises UsageError where a stage cannot take over the weights of the one before; train.py would say it later."""
    for number, (before, now) in enumerate(pairwise(map(config_from_dict, networks)), 2):
        for name, (old, new) in unlike_weights(before, now).items():
            raise UsageError(
                f"model.network.{name} is {new} behind -- number {number}, but {old} in the stage before, whose "
                "weights it starts from: give it the same model (its --config and its options of model.network)"
            )


def _planned(config: TwinsConfig, data: dict[str, Any], number: int) -> dict[str, Any]:
    """Tokenizer and sequence length of the checkpoints that a run of this stage will have. data: of its `_settings`.
    Raises ValueError, FileNotFoundError."""
    if number == 1 and len(config.lrs) > 1 and not data["val_sequences"]:
        raise UsageError("data.val_sequences is 0: learning rates are chosen by the validation loss; set it")
    if not data["sources"]:
        raise UsageError("data.sources is empty behind --: the twins are compared on a corpus, name the trained one")
    source = Path(data["sources"][0]["path"])
    store = TokenStore(source / "train", verify="size")
    tokenizer = {"fingerprint": store.fingerprint_of_tokenizer, "path": str(store.tokenizer_path)}
    return {"tokenizer": tokenizer, "sequence_length": data["sequence_length"]}


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
    record = _open_record(output, config, options)
    for kind in config.kinds:
        if kind not in record["lr"]:
            record["lr"][kind], record["sweep"][kind] = _choose_lr(config, kind, options, output, train)
            write_json(_record(output), record)
    return _train_each(config, 1, output, lambda kind, *more: train(_options(options, kind, record["lr"][kind], *more)))


def train_on(number: int, config: TwinsConfig, options: list[str], output: Path, train: Train) -> list[Path]:
    """Train the stage of this number, from 2 on, of all twins, as `train_twins` the first. options: of this stage."""

    def go_on(kind: str, seed: int, run: Path) -> int:
        before = _run(output, kind, seed, number - 1)
        code = train([*_options(options, kind, None, seed, run), "--init_from", str(before)])
        record = _read_record(output)
        if not code and len(later := record.get("later", [])) < number - 1:
            write_json(_record(output), {**record, "later": [*later, options]})
        return code

    return _train_each(config, number, output, go_on)


def _train_each(config: TwinsConfig, number: int, output: Path, train: TrainOne) -> list[Path]:
    """train: of a kind, a seed and a run folder. Returns the run folders, the kinds of a seed next to each other."""
    runs = []
    for seed, kind in product(config.seeds, config.kinds):
        runs.append(_run(output, kind, seed, number))
        check_code(train(kind, seed, runs[-1]), runs[-1])
    return runs


def _run(output: Path, kind: str, seed: int, number: int) -> Path:
    return output / f"{kind}-seed-{seed}{_suffix(number)}"


def _suffix(number: int) -> str:
    """Of what belongs to a stage of training, from 1 on."""
    return "" if number == 1 else f"-stage{number}"


def _choose_lr(
    config: TwinsConfig, kind: str, options: list[str], output: Path, train: Train
) -> tuple[float | None, dict[str, float | None]]:
    """The learning rate of the lowest validation loss, and the losses by learning rate (None: diverged)."""
    if len(config.lrs) < 2:
        return (config.lrs[0] if config.lrs else None), {}
    steps, losses = str(config.sweep_steps), {}
    for lr in config.lrs:
        run = output / "sweep" / f"{kind}-lr-{lr:g}"
        length = ["--trainer.max_steps", steps, "--trainer.max_tokens", "null"]
        trial = [*length, "--validation.every_n_steps", steps, "--checkpoint.every_n_steps", steps]
        code = train([*_options(options, kind, lr, config.seeds[0], run), *trial])
        check_code(code, run, DIVERGED)
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


def _record(output: Path) -> Path:
    return output / "twins.json"


def _read_record(output: Path) -> dict[str, Any]:
    way_out = "choose another --output, or remove it to choose learning rates again"
    return read_json(_record(output), way_out, {"twins": dict, "options": list, "lr": dict, "sweep": dict})


def _open_record(output: Path, config: TwinsConfig, options: list[str]) -> dict[str, Any]:
    path, asked = _record(output), {"twins": asdict(config), "options": options}
    if not path.is_file():
        record = {**asked, "code_version": code_version(), "lr": {}, "sweep": {}}
        write_json(path, record)
        return record
    record = _read_record(output)
    for name in asked:
        if record[name] != asked[name]:
            raise ValueError(
                f"{path} was made with {name} {record[name]}, now it is {asked[name]}: repeat that command, or choose "
                "another --output"
            )
    return record


if __name__ == "__main__":
    sys.exit(main())
