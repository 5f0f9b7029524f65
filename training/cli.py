"""The command line of train.py: options, their checks, and how a run is put together."""

import logging
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, NoReturn

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import SLURMEnvironment

from common.checks import check_number
from common.command_line import StrictParsing, strict_yaml, take_values_whole, union_in_words
from common.errors import UsageError, error_line
from common.exits import CRASHED
from data.datamodule import PackedDataModule, check_sizes
from model.checkpoint import CheckpointInfo, resolve_checkpoint
from model.config import ModelConfig, config_from_dict
from model.flops import sequence_cost
from model.version import code_version
from training.arguments import add_run_arguments
from training.callbacks.checkpointing import NotSaved, RunCheckpoint
from training.callbacks.metrics import (
    AttentionStats,
    GradientNorms,
    MetricsLogger,
    StepProgress,
)
from training.callbacks.profiling import StepProfiler
from training.distributed.config import check_combinations
from training.distributed.sequence_parallel import check_sequence_parallel
from training.distributed.strategies import build_strategy
from training.faults.devices import DEVICE_ERRORS, less_memory, report_failure
from training.faults.ending import exit_code
from training.faults.interruption import Interruption
from training.faults.signals import StopSignals
from training.faults.step_guard import StepGuard
from training.faults.watchdog import Watchdog
from training.length import check_warmup, tokens_to_steps
from training.module import LanguageModule
from training.options import (
    REFUSED_OPTIONS,
    as_list,
    check_callbacks,
    check_plugins,
    check_tasks,
    check_trainer_options,
    count_processes,
)
from training.resume.run_folder import hold_run_folder
from training.resume.settings import check_allowed, check_settings, run_settings, warmup_of
from training.resume.start_point import (
    StartPoint,
    check_architecture,
    check_start,
    check_tokenizer,
    choose_start,
    read_data_state,
    warn_of_unknown_data,
)
from training.resume.transfer import check_transfer, transfer_weights
from training.setup_checks import (
    check_copy_fits,
    check_runs_here,
    duration,
    first_device,
    usable_folder,
)
from training.step.float8 import check_device, check_products
from training.step.loss import resolve_loss_backend
from training.step.teacher import find_teacher, load_teacher
from training.throughput import StepClock
from training.tracking import is_first_process, log_config, make_loggers, record_session, say

TRAINER_DEFAULTS: dict[str, Any] = {
    "log_every_n_steps": 10, "num_sanity_val_steps": 0, "enable_model_summary": False, "use_distributed_sampler": False,
}  # fmt: skip
LONGEST_MESSAGE = 500
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


def shortened(message: str) -> str:
    """A parser's message in one line; of a type that has many forms, the first and the last line say what is wrong."""
    lines = [line.strip() for line in union_in_words(message).splitlines() if line.strip()]
    line = " ".join(lines)
    line = re.sub(r"(Union|Optional)\[[^\n]{80,}?\](?= |\.|$)", "one of several types", line)
    return (
        line
        if len(line) <= LONGEST_MESSAGE
        else f"{line[: LONGEST_MESSAGE // 2]} [...] {line[-LONGEST_MESSAGE // 2 :]}"
    )


class OneLineParser(StrictParsing, LightningArgumentParser):  # type: ignore[misc]
    """Raises instead of printing its usage text and exiting."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UsageError(shortened(message)) from ex


class TrainingCLI(LightningCLI):
    """Parses the options, checks them, and builds data, module and trainer of one training session."""

    needs_run_dir = True

    def __init__(self, stop: StopSignals | None = None) -> None:
        self.stop = stop
        for pattern in HARMLESS_WARNINGS:
            warnings.filterwarnings("ignore", pattern)
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)  # banners; what matters of them is said by this file
        strict_yaml()
        take_values_whole()
        super().__init__(
            LanguageModule, PackedDataModule, save_config_callback=None, seed_everything_default=0,
            trainer_defaults=TRAINER_DEFAULTS, parser_class=OneLineParser, run=False, auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )  # fmt: skip

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        add_run_arguments(parser, needs_run_dir=self.needs_run_dir)
        parser.link_arguments("parallel.zero_stage", "model.deferred", compute_fn=bool, apply_on="instantiate")

    def before_instantiate_classes(self) -> None:
        """Check what needs no model and no data, and choose the checkpoint to start from."""
        self._note("looking at options and checkpoints")
        options = self.config.trainer
        check_trainer_options(options, self.lightning_defaults())
        check_tasks(count_processes(options))
        if self.config.init_from and self.config.resume not in ("none", "auto"):
            raise UsageError(
                f"--init_from {self.config.init_from} starts a new run, --resume {self.config.resume} continues one: "
                "use one of them (--resume auto goes with --init_from)"
            )
        check_allowed(self.config.allow_changes)
        self.max_time = duration(options.max_time)
        data = self.config.data
        check_sizes(data.sequence_length, data.global_batch_size, data.micro_batch_size)
        self.run_dir = usable_folder(self.config.run_dir)
        self.run_lock = hold_run_folder(self.run_dir)  # before looking at what lies there
        verify, alone = self.config.checkpoint.verify, count_processes(options) == 1
        self.start: StartPoint = choose_start(self.run_dir, self.config.resume, verify, alone=alone)
        warmup = warmup_of(self.start.checkpoint)
        length = tokens_to_steps(self.config, step=self.start.step, tokens=self.start.tokens, warmup_steps=warmup)
        check_warmup(self.config.model.optimizer.warmup_steps, options.max_steps, length)
        network = config_from_dict(self.config.model.network.as_dict())
        if self.start.checkpoint:
            check_architecture(self.start.checkpoint, asdict(network))
        self.teacher = find_teacher(self.config.model.distill.teacher, network, self.config.parallel.sequence_parallel)
        check_runs_here(network, first_device(options))
        check_device(self.config.model.float8, first_device(options))
        if self.config.checkpoint.asynchronous:
            check_copy_fits(network, self.config.model.optimizer.name, options.num_nodes)
        self.init_from = self._choose_weights(network)
        if self.start.step >= self.config.trainer.max_steps:
            if verify == "checksum" and is_first_process():
                check_start(self.start, self.run_dir)
            say(f"already at step {self.start.step} of {length.run}: nothing to train")
            sys.exit(0)

    def lightning_defaults(self) -> dict[str, Any]:
        return {key: self.parser.get_default(f"trainer.{key}") for key in (*REFUSED_OPTIONS, "max_steps")}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        seed = self.config.seed_everything
        if not isinstance(seed, bool):  # before Lightning takes it
            check_number("seed_everything", seed, least=0, most=2**32 - 1, whole=True)

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
        options.pop("max_time")  # interruption.py sees to it
        options.pop("max_tokens")  # length.py has made steps of it
        every = self.config_init.validation.every_n_steps
        if not every:
            options["limit_val_batches"] = 0
        elif not self.datamodule.val_sequences:
            raise UsageError(f"validation.every_n_steps is {every}, but data.val_sequences is 0: set both or neither")
        options["logger"] = make_loggers(self.run_dir, self.start.step, self.config_init.wandb)
        callbacks, plugins = as_list(options["callbacks"]), as_list(options["plugins"])
        check_callbacks(callbacks)
        check_plugins(plugins)
        shown = options["enable_progress_bar"] is not False
        ours = [callback for callback in self._callbacks() if shown or not isinstance(callback, StepProgress)]
        options["callbacks"] = [*callbacks, *ours]
        options |= {"check_val_every_n_epoch": None, "val_check_interval": 1}  # the interval follows below
        teacher = self.teacher.architecture if self.teacher else None
        self.datamodule.sequence_cost = partial(sequence_cost, self.model.network_config, teacher=teacher)
        parallel = self.config_init.parallel
        ranks = count_processes(options)
        tokens = self.datamodule.micro_batch_size * self.datamodule.sequence_length
        check_sequence_parallel(parallel, self.model.network_config, tokens, ranks)
        options["strategy"] = build_strategy(parallel, processes=ranks, device=first_device(options))
        if SLURMEnvironment.detect():
            # Lightning would save inside its signal handler, where ranks wait for each other: see interruption.py
            options["plugins"] = [*plugins, SLURMEnvironment(auto_requeue=False)]
        trainer = Trainer(**options)
        assert self.stop is not None
        self.stop.ranks.launcher = trainer.strategy.launcher  # before it starts ranks, which end with this one
        # signals.py handles them: Lightning's SIGTERM handler would wait for other ranks
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        model = self.config.model
        check_combinations(
            parallel, precision=trainer.precision, compile=model.compile, optimizer=model.optimizer.name,
            freezes=self.model.network_config.attention.freezes,
        )  # fmt: skip
        check_products(
            model.float8, precision=trainer.precision, tokens=tokens // parallel.sequence_parallel,
            tile_tokens=model.mlp_tile_tokens,
        )  # fmt: skip
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
        metrics = MetricsLogger(clock, self.guard, self.start)
        return [
            Watchdog(config.watchdog, self.stop.progress, self.stop.ranks),
            StepProfiler(config.profile, self.run_dir, clock),
            self.guard,
            self.interruption,
            metrics,
            AttentionStats(config.stats, clock),
            GradientNorms(config.stats),
            StepProgress(metrics),
            RunCheckpoint(self.run_dir, config.checkpoint, self.start, self.version, clock, self.stop.progress),
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
        # before the run folder has a record
        resolve_loss_backend(self.model.loss_backend, self.trainer.strategy.root_device)
        if self.config_init.validation.every_n_steps:
            self.datamodule.validation_packing(self.trainer.world_size // self.config_init.parallel.sequence_parallel)
        tokenizer = str(self.datamodule.tokenizer_path), self.datamodule.tokenizer_fingerprint
        verify = self.config_init.checkpoint.verify
        if self.teacher:
            check_tokenizer(self.teacher, *tokenizer, instead="another model.distill.teacher")
            self.model.teacher = load_teacher(self.teacher, verify)
            say(f"distilling from {self.teacher.path} (step {self.teacher.step})")
        if self.start.checkpoint:
            check_tokenizer(self.start.checkpoint, *tokenizer)
            state = read_data_state(self.start.checkpoint, PackedDataModule.__qualname__, verify)
            self.datamodule.load_state_dict(state)
            warn_of_unknown_data(self.start.checkpoint, state)
            settings = run_settings(self.trainer, self.model, self.datamodule.global_batch_size)
            check_settings(self.start.checkpoint, settings, self.config_init.allow_changes)
        elif self.init_from:
            check_tokenizer(self.init_from, *tokenizer)
            self.model.taken_over = transfer_weights(self.init_from, self.model.model, verify)
        config = self.parser.dump(self.config, skip_none=False)
        record_session(self.run_dir, self.start.step, config, self.version)
        log_config(self.trainer.loggers, yaml.safe_load(config), self.version)

    def describe(self) -> str:
        """One line on what is about to run."""
        data, trainer, module = self.datamodule, self.trainer, self.model
        parameters, device = module.model.initial.count(), trainer.strategy.root_device  # ZeRO 3 has divided them
        products = module.converted
        fp8 = f", {products.float8} of the blocks' {products.all} linears in FP8 ({module.float8})" if products else ""
        return (
            f"training {parameters:,} parameters ({module.network_config.attention.kind}) from step {self.start.step} "
            f"to {trainer.max_steps}: {data.global_batch_size} x {data.sequence_length} tokens a step, accumulated "
            f"over {trainer.accumulate_grad_batches}, on {trainer.world_size} x {device.type} in {trainer.precision}, "
            f"loss backend {resolve_loss_backend(module.loss_backend, device)}{fp8}"
        )

    def fit(self, on_start: Callable[[], None]) -> int:
        """Train to trainer.max_steps, or until stopped; on_start is called before the first step, once nothing of what
        was asked for can turn out impossible any more.

        Returns:
            The exit code of this process (common/exits.py).
        """
        said = False

        def start(*_: Any) -> None:
            nonlocal said
            if not said:
                said = True
                on_start()
                say(self.describe())

        # of the hooks that a resumed session has too, the first behind all checks, loaders and a first batch
        started = LambdaCallback(on_train_batch_start=start)
        self.trainer.callbacks.append(started)  # type: ignore[attr-defined]
        try:
            # weights_only: nothing pickled in a checkpoint is executed
            self.trainer.fit(self.model, self.datamodule, ckpt_path=self.start.trainer_state, weights_only=True)
        except (NotSaved, *DEVICE_ERRORS) as error:
            if "--debug" in sys.argv:
                raise
            if not isinstance(error, NotSaved):
                less = less_memory(self.config, self.model.network_config) if said else []
                return report_failure(error, self.trainer, less, self.run_dir)
            say(f"error: {error_line(error)}")
            return CRASHED if self.trainer.is_global_zero else 0  # as in exit_code
        return exit_code(self.trainer, self.guard, self.interruption, self.run_dir)
