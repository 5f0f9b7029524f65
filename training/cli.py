"""The command line of train.py: options, their checks, and how a run is put together."""

import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.callbacks import LambdaCallback, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import SLURMEnvironment

from common.errors import UsageError
from common.exits import INTERRUPTED, TOO_MANY_SKIPPED
from data.datamodule import PackedDataModule
from model.checkpoint import CheckpointInfo, resolve_checkpoint
from model.config import ModelConfig, config_from_dict
from model.version import code_version
from training.callbacks import (
    AttentionStats,
    GradientNorms,
    MetricsLogger,
    StatsConfig,
    StepProgress,
    ValidationConfig,
)
from training.checkpointing import CheckpointConfig, RunCheckpoint
from training.guard import GuardConfig, StepGuard
from training.interruption import Interruption, InterruptionConfig
from training.loss import resolve_loss_backend
from training.module import LanguageModule
from training.parallel import ParallelConfig, check_combinations
from training.profiling import ProfileConfig, StepProfiler
from training.resume import (
    StartPoint,
    check_architecture,
    check_tokenizer,
    choose_start,
    read_data_state,
    warn_of_unknown_data,
)
from training.run_folder import hold_run_folder
from training.sequence_parallel import check_sequence_parallel
from training.settings import check_allowed, check_settings, run_settings
from training.signals import StopSignals
from training.start import check_transfer, transfer_weights
from training.strategies import build_strategy
from training.throughput import StepClock
from training.tracking import WandbConfig, log_config, make_loggers, record_session, say
from training.watchdog import Watchdog, WatchdogConfig

# Trainer options that this recipe decides itself, and the option to use instead.
OWNED_BY_THE_RECIPE = {
    "logger": "wandb.*",
    "default_root_dir": "--run_dir",
    "enable_checkpointing": "checkpoint.*",
    "val_check_interval": "validation.every_n_steps",
    "check_val_every_n_epoch": "validation.every_n_steps",
    "max_epochs": "trainer.max_steps",
    "strategy": "parallel.*",
    "gradient_clip_algorithm": "trainer.gradient_clip_val, which clips by norm",
}
TRAINER_DEFAULTS: dict[str, Any] = {
    "log_every_n_steps": 10, "num_sanity_val_steps": 0, "enable_model_summary": False, "use_distributed_sampler": False,
}  # fmt: skip
# Each of these is known to be harmless here.
HARMLESS_WARNINGS = {
    r".*does not have many workers.*": "packing a sequence costs microseconds; data.num_workers is the user's choice",
    r".*Experiment logs directory .* exists and is not empty.*": "a session that restarts at a step replaces its rows",
    r".*You're resuming from a checkpoint that ended before the epoch ended.*": "the sampler resumes itself",
    r".*The number of training batches .* is smaller than the logging interval.*": "the last step is always logged",
    r".*You have overridden `on_before_batch_transfer` in `LightningModule`.*": "it counts FLOPs and slices sequences",
    r".*`torch.distributed.\w+_tensor` is deprecated.*": "DeepSpeed's use of it, not ours",
    r".*The `srun` command is available on your system but is not used.*": "a run on a login node, or one GPU of a job",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*": "Lightning's use of torch.utils._pytree, not ours",
}


class OneLineParser(LightningArgumentParser):
    """Raises instead of printing its usage text and exiting."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UsageError(f"{' '.join(message.split())} (python train.py --help lists all options)") from ex


class TrainingCLI(LightningCLI):
    """Parses the options, checks them, and builds data, module and trainer of one training session."""

    needs_run_dir = True

    def __init__(self, stop: StopSignals | None = None) -> None:
        self.stop = stop
        for pattern in HARMLESS_WARNINGS:
            warnings.filterwarnings("ignore", pattern)
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)  # banners; what matters of them is said by this file
        super().__init__(
            LanguageModule, PackedDataModule, save_config_callback=None, seed_everything_default=0,
            trainer_defaults=TRAINER_DEFAULTS, parser_class=OneLineParser, run=False, auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )  # fmt: skip

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_dir", type=str if self.needs_run_dir else str | None, required=self.needs_run_dir,
            help="Folder of the run: checkpoints, metrics, config.",
        )  # fmt: skip
        parser.add_argument(
            "--resume",
            type=str,
            default="none",
            help="none, auto (newest complete checkpoint of run_dir) or a path.",
        )
        parser.add_argument(
            "--init_from",
            type=str | None,
            default=None,
            help="Run or checkpoint folder whose weights a new run starts from; a run that is resumed has its own.",
        )
        parser.add_argument(
            "--allow_changes",
            type=list[str],
            default=[],
            help='Options in which a run that resumes may leave its learning-rate schedule: "[trainer.max_steps]".',
        )
        parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
        parser.add_class_arguments(CheckpointConfig, "checkpoint")
        parser.add_class_arguments(GuardConfig, "guard")
        parser.add_class_arguments(InterruptionConfig, "interruption")
        parser.add_class_arguments(ParallelConfig, "parallel")
        parser.add_class_arguments(ProfileConfig, "profile")
        parser.add_class_arguments(StatsConfig, "stats")
        parser.add_class_arguments(ValidationConfig, "validation")
        parser.add_class_arguments(WandbConfig, "wandb")
        parser.add_class_arguments(WatchdogConfig, "watchdog")

    def before_instantiate_classes(self) -> None:
        """Check what needs no model and no data, and choose the checkpoint to start from."""
        self._note("looking at options and checkpoints")
        defaults = {key: self.parser.get_default(f"trainer.{key}") for key in OWNED_BY_THE_RECIPE}
        check_trainer_options(self.config.trainer, defaults)
        if self.config.init_from and self.config.resume not in ("none", "auto"):
            raise UsageError(
                f"--init_from {self.config.init_from} starts a new run, --resume {self.config.resume} continues one: "
                "use one of them (--resume auto goes with --init_from)"
            )
        check_allowed(self.config.allow_changes)
        self.run_dir = Path(self.config.run_dir)
        self.run_lock = hold_run_folder(self.run_dir)  # before looking at what lies there
        self.start: StartPoint = choose_start(self.run_dir, self.config.resume)
        network = config_from_dict(self.config.model.network.as_dict())
        if self.start.checkpoint:
            check_architecture(self.start.checkpoint, asdict(network))
        self.init_from = self._choose_weights(network)
        if self.start.step >= self.config.trainer.max_steps:
            wanted = self.config.trainer.max_steps
            say(f"already at step {self.start.step} of trainer.max_steps {wanted}: nothing to train")
            sys.exit(0)

    def _note(self, activity: str) -> None:
        if self.stop is not None:
            self.stop.progress.note(activity, None)

    def _choose_weights(self, network: ModelConfig) -> CheckpointInfo | None:
        """The checkpoint of --init_from, where it applies."""
        if self.config.init_from is None or self.start.checkpoint:
            return None  # a requeued job resumes, with the same command line
        found = resolve_checkpoint(self.config.init_from)
        check_transfer(found, network)
        return found

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with this recipe's loggers and callbacks, accumulating as the data's batch sizes ask."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        options = {**self.config_init.trainer, "default_root_dir": self.run_dir}
        asked = options.pop("accumulate_grad_batches")
        self.max_time = duration(options.pop("max_time"))
        every = self.config_init.validation.every_n_steps
        if not every:
            options["limit_val_batches"] = 0
        elif not self.datamodule.val_sequences:
            raise UsageError(f"validation.every_n_steps is {every}, but data.val_sequences is 0: set both or neither")
        options["logger"] = make_loggers(self.run_dir, self.start.step, self.config_init.wandb)
        options["callbacks"] = [*(options["callbacks"] or []), *self._callbacks()]
        options |= {"check_val_every_n_epoch": None, "val_check_interval": 1}  # the interval follows below
        parallel = self.config_init.parallel
        ranks = count_processes(options)
        tokens = self.datamodule.micro_batch_size * self.datamodule.sequence_length
        check_sequence_parallel(parallel, self.model.network_config, tokens, ranks)
        options["strategy"] = build_strategy(parallel, processes=ranks, device=first_device(options))
        if SLURMEnvironment.detect():
            # Lightning would save inside its signal handler, where ranks wait for each other: see interruption.py
            options["plugins"] = [*as_list(options["plugins"]), SLURMEnvironment(auto_requeue=False)]
        trainer = Trainer(**options)
        # signals.py handles them: Lightning's SIGTERM handler would wait for other ranks
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        check_combinations(parallel, precision=trainer.precision, compile=self.config.model.compile)
        data_ranks = trainer.world_size // parallel.sequence_parallel
        trainer.accumulate_grad_batches = self.datamodule.accumulation(data_ranks)
        trainer.val_check_interval = max(1, every) * trainer.accumulate_grad_batches
        if asked not in (1, trainer.accumulate_grad_batches):
            raise UsageError(
                f"trainer.accumulate_grad_batches is {asked}, but data.global_batch_size and data.micro_batch_size "
                f"give {trainer.accumulate_grad_batches} on {data_ranks} data-parallel ranks: leave it out"
            )
        return trainer

    def _callbacks(self) -> list[Any]:
        clock = StepClock()
        self.version = code_version()
        config = self.config_init
        assert self.stop is not None
        self.interruption = Interruption(config.interruption, self.stop, self.max_time)
        self.model.guard = self.guard = StepGuard(config.guard, self.interruption, self.run_dir, self.version)
        metrics = MetricsLogger(clock, self.guard, self.start.tokens)
        return [
            Watchdog(config.watchdog, self.stop.progress, self.stop.ranks),
            StepProfiler(config.profile, self.run_dir, clock),
            self.guard,
            self.interruption,
            metrics,
            AttentionStats(config.stats, clock),
            GradientNorms(config.stats),
            StepProgress(metrics),
            RunCheckpoint(self.run_dir, config.checkpoint, self.start, self.version, clock),
        ]

    def prepare(self) -> None:
        """Open the data, check that it fits, and record this session in the run folder."""
        self._note("loading the data")
        self.datamodule.setup("fit")
        vocab_size = self.model.network_config.vocab_size
        if self.datamodule.vocab_size > vocab_size:
            raise UsageError(
                f"model.network.vocab_size is {vocab_size}, but the tokenizer {self.datamodule.tokenizer_path} has "
                f"{self.datamodule.vocab_size} pieces: set it to at least that"
            )
        if self.start.checkpoint:
            check_tokenizer(
                self.start.checkpoint,
                str(self.datamodule.tokenizer_path),
                self.datamodule.tokenizer_fingerprint,
            )
            verify = self.config_init.checkpoint.verify
            state = read_data_state(self.start.checkpoint, PackedDataModule.__qualname__, verify)
            self.datamodule.load_state_dict(state)
            warn_of_unknown_data(self.start.checkpoint, state)
            settings = run_settings(self.trainer, self.model, self.datamodule.global_batch_size)
            check_settings(self.start.checkpoint, settings, self.config_init.allow_changes)
        elif self.init_from:
            check_tokenizer(self.init_from, str(self.datamodule.tokenizer_path), self.datamodule.tokenizer_fingerprint)
            transfer_weights(self.init_from, self.model.model, self.config_init.checkpoint.verify)
        config = self.parser.dump(self.config, skip_none=False)
        record_session(self.run_dir, self.start.step, config, self.version)
        log_config(self.trainer.loggers, yaml.safe_load(config), self.version)

    def describe(self) -> str:
        """One line on what is about to run."""
        data, trainer, module = self.datamodule, self.trainer, self.model
        parameters, device = sum(p.numel() for p in module.parameters()), trainer.strategy.root_device
        return (
            f"training {parameters:,} parameters ({module.network_config.attention.kind}) from step {self.start.step} "
            f"to {trainer.max_steps}: {data.global_batch_size} x {data.sequence_length} tokens a step, accumulated "
            f"over {trainer.accumulate_grad_batches}, on {trainer.world_size} x {device.type} in {trainer.precision}, "
            f"loss backend {resolve_loss_backend(module.loss_backend, device)}"
        )

    def fit(self, on_start: Callable[[], None]) -> int:
        """Train to trainer.max_steps, or until stopped; on_start is called before the first step.

        Returns:
            The exit code of this process (common/exits.py).
        """
        say(self.describe())
        started = LambdaCallback(on_train_start=lambda *_: on_start())
        self.trainer.callbacks.append(started)  # type: ignore[attr-defined]
        # weights_only: nothing pickled in a checkpoint is executed
        self.trainer.fit(self.model, self.datamodule, ckpt_path=self.start.trainer_state, weights_only=True)
        return self._exit_code()

    def _exit_code(self) -> int:
        """Also says how the session ended, unless it is the run's end. Only rank 0 reports it: Lightning's launcher and
        srun take a code that is not 0 for a crash and kill the other ranks, which are ending anyway."""
        trainer, code = self.trainer, 0
        if self.guard.gave_up:
            code = TOO_MANY_SKIPPED
            say(
                f"stopped at step {trainer.global_step}: more than guard.max_skipped = {self.guard.config.max_skipped} "
                f"of the last {self.guard.config.window} steps went wrong. What reproduces the last one is in "
                f"{self.guard.folder}; --resume auto goes on behind it (exit code {code})"
            )
        elif self.interruption.agreed and trainer.global_step < trainer.max_steps:
            self.interruption.signals.ignore()
            code = INTERRUPTED
            say(
                f"stopped by {self.interruption.reason} at step {trainer.global_step}, which is saved: the same "
                f"command with --resume auto continues (exit code {code})"
            )
        return code if trainer.is_global_zero else 0


def as_list(value: Any) -> list[Any]:
    """Lightning's options that are one thing, several or none, as a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def duration(max_time: Any) -> timedelta | None:
    """Of trainer.max_time: "DD:HH:MM:SS", a dict of timedelta's arguments, or a timedelta."""
    if max_time is None:
        return None
    seconds = Timer(max_time)._duration
    if seconds is None or seconds <= 0:
        raise UsageError(f"trainer.max_time is {max_time!r}: expected a time, as in 00:12:00:00 (DD:HH:MM:SS)")
    return timedelta(seconds=seconds)


def count_processes(options: dict[str, Any]) -> int:
    """Ranks that Trainer options ask for, over all nodes."""
    devices, accelerator = options["devices"], options["accelerator"]
    if devices in ("auto", -1, "-1"):
        on_cuda = torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda")
        count = torch.cuda.device_count() if on_cuda else 1
    elif isinstance(devices, str) and not devices.isdigit():
        count = len([device for device in devices.split(",") if device])
    else:
        count = len(devices) if isinstance(devices, list) else int(devices)
    return count * options["num_nodes"]


def first_device(options: dict[str, Any]) -> torch.device:
    """The first device that Trainer options ask for on a node."""
    if options["accelerator"] in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", (CUDAAccelerator.parse_devices(options["devices"]) or [0])[0])
    return torch.device("cpu")


def check_trainer_options(options: Any, defaults: dict[str, Any]) -> None:
    """Raises UsageError for Trainer options that cannot work, or that this recipe sets itself."""
    for key, instead in OWNED_BY_THE_RECIPE.items():
        if options.get(key) != defaults[key]:
            raise UsageError(f"trainer.{key} is {options.get(key)!r}: leave it out and use {instead}")
    if options.max_steps < 1:
        raise UsageError(
            f"trainer.max_steps is {options.max_steps}: expected the number of optimizer steps, at least 1"
        )
    if options.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UsageError(
            f"trainer.accelerator is {options.accelerator!r}, but torch finds no CUDA device: use "
            "--config configs/cluster/cpu.yaml or --trainer.accelerator cpu, or install a driver that fits torch "
            f"{torch.__version__}"
        )
