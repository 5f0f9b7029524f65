"""Which of Lightning's Trainer options and callbacks work here, and what to use instead of the others."""

import os
from collections.abc import Mapping
from typing import Any

import lightning.pytorch.callbacks as lightning_callbacks
import torch
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.callbacks import Callback

from common.checks import check_number
from common.errors import UsageError
from training.faults.signals import LAUNCHER
from training.length import check_length

ACCELERATORS = ("auto", "cpu", "gpu", "cuda")
# By Lightning's names for each. Others do not train (16-true), or not to what a checkpoint in float32 holds (64-true).
PRECISIONS: dict[Any, str] = {
    **dict.fromkeys((None, "32-true", "32", 32), "32-true"), **dict.fromkeys(("bf16-mixed", "bf16"), "bf16-mixed"),
    "bf16-true": "bf16-true", **dict.fromkeys(("16-mixed", "16", 16), "16-mixed"),
}  # fmt: skip
WORKING_OPTIONS = (
    "accelerator", "devices", "num_nodes", "precision", "callbacks", "max_steps", "max_time", "limit_val_batches",
    "log_every_n_steps", "enable_progress_bar", "enable_model_summary", "accumulate_grad_batches", "gradient_clip_val",
    "deterministic", "benchmark", "inference_mode", "detect_anomaly", "enable_autolog_hparams",
    "plugins",  # cluster environments
)  # fmt: skip
# Options that this recipe decides itself, or that would not mean what they say, and what to use instead.
REFUSED_OPTIONS = {
    "logger": "wandb.*",
    "default_root_dir": "--run_dir",
    "enable_checkpointing": "checkpoint.*",
    "model_registry": "checkpoint.* and python -m model.export",
    "val_check_interval": "validation.every_n_steps",
    "check_val_every_n_epoch": "validation.every_n_steps",
    "num_sanity_val_steps": "validation.every_n_steps",
    "max_epochs": "trainer.max_steps",
    "min_epochs": "trainer.max_steps",
    "min_steps": "trainer.max_steps",
    "limit_train_batches": "trainer.max_steps, or data.sources with less data",
    "limit_test_batches": "python -m eval.run, which tests",
    "limit_predict_batches": "python -m eval.generate, which predicts",
    "overfit_batches": "data.sources with a small corpus and a large trainer.max_steps",
    "fast_dev_run": "a small trainer.max_steps and a --run_dir of its own",
    "barebones": "stats.every_n_steps 0 and a large trainer.log_every_n_steps",
    "profiler": "profile.steps",
    "strategy": "parallel.*",
    "use_distributed_sampler": "nothing: the data module divides samples among the ranks",
    "reload_dataloaders_every_n_epochs": "nothing: the order of samples follows from data.seed",
    "sync_batchnorm": "nothing: the model has no batch norm",
    "gradient_clip_algorithm": "trainer.gradient_clip_val, which clips by norm",
}
WORKING_CALLBACKS = (
    "Callback", "DeviceStatsMonitor", "LambdaCallback", "LearningRateMonitor", "ModelSummary", "RichModelSummary",
)  # fmt: skip
REFUSED_CALLBACKS = {
    "ModelCheckpoint": "checkpoint.*",
    "OnExceptionCheckpoint": "checkpoint.*",
    "Checkpoint": "checkpoint.*",
    "TQDMProgressBar": "the progress bar that is there, or trainer.enable_progress_bar false",
    "RichProgressBar": "the progress bar that is there, or trainer.enable_progress_bar false",
    "ProgressBar": "the progress bar that is there, or trainer.enable_progress_bar false",
    "EarlyStopping": "trainer.max_steps, or a signal, which saves: no metric is given to Lightning to be monitored",
    "Timer": "trainer.max_time",
    "SpikeDetection": "guard.spike_deviations",
    "ThroughputMonitor": "the throughput/* that is logged anyway",
    "GradientAccumulationScheduler": "data.global_batch_size and data.micro_batch_size",
    "BatchSizeFinder": "data.micro_batch_size and python -m training.memory, which estimates",
    "LearningRateFinder": "model.optimizer.lr",
    "EMAWeightAveraging": "model.optimizer.schedule wsd, whose decay does what averages do: they would not be saved",
    "WeightAveraging": "model.optimizer.schedule wsd, whose decay does what averages do: they would not be saved",
    "StochasticWeightAveraging": "model.optimizer.schedule wsd, whose decay does what averages do",
    "BackboneFinetuning": "--init_from, which trains all weights",
    "BaseFinetuning": "--init_from, which trains all weights",
    "ModelPruning": "no pruning: checkpoints hold whole weights",
    "BasePredictionWriter": "python -m eval.generate, which predicts",
}


def check_trainer_options(options: Any, defaults: Mapping[str, Any], *, to_train: bool = True) -> None:
    """Raises ValueError for Trainer options that cannot work, or that this recipe sets itself.

    Args:
        options: of the Trainer, as parsed, with max_tokens.
        defaults: of refused options.
        to_train: the accelerator must be there, and the length be given.
    """
    for key, instead in REFUSED_OPTIONS.items():
        if options.get(key) != defaults[key]:
            raise UsageError(f"trainer.{key} is {options.get(key)!r}: leave it out and use {instead}")
    check_length(options, defaults["max_steps"], needed=to_train)
    check_number("trainer.num_nodes", options.num_nodes, least=1, whole=True)
    check_number("trainer.log_every_n_steps", options.log_every_n_steps, least=1, whole=True)
    check_number("trainer.gradient_clip_val", options.gradient_clip_val, least=0, zero="never", null="never")
    check_number("trainer.accumulate_grad_batches", options.accumulate_grad_batches, least=1, whole=True)
    _check_devices(options, to_train)
    _check_precision(options, to_train)


def _check_precision(options: Any, to_train: bool) -> None:
    if options.precision not in PRECISIONS:
        names = ", ".join(dict.fromkeys(PRECISIONS.values()))
        raise UsageError(f"trainer.precision is {options.precision!r}: expected one of {names}")
    if to_train and PRECISIONS[options.precision] == "16-mixed" and not on_cuda(options):
        raise UsageError(
            f"trainer.precision is {options.precision!r}, which needs a CUDA device: use bf16-mixed or 32-true on a CPU"
        )


def on_cuda(options: Mapping[str, Any]) -> bool:
    """Whether Trainer options ask for CUDA devices that are there."""
    return options.get("accelerator") in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def _check_devices(options: Any, needs_device: bool) -> None:
    accelerator, devices = options.accelerator, options.devices
    if accelerator not in ACCELERATORS:
        raise UsageError(f"trainer.accelerator is {accelerator!r}: expected {', '.join(ACCELERATORS[:-1])} or cuda")
    if needs_device and accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UsageError(
            f"trainer.accelerator is {accelerator!r}, but torch finds no CUDA device: use "
            "--config configs/cluster/cpu.yaml or --trainer.accelerator cpu, or install a driver that fits torch "
            f"{torch.__version__}"
        )
    if devices in ("auto", -1, "-1"):
        return
    if isinstance(devices, list) or "," in str(devices):  # GPUs by their numbers
        numbers = [str(n).strip() for n in (devices if isinstance(devices, list) else devices.split(","))]
        fits = any(numbers) and all(number.isdigit() for number in numbers if number)
    else:
        fits = str(devices).isdigit() and int(devices) >= 1
    if not fits:
        raise UsageError(
            f"trainer.devices is {devices!r}: expected auto, a number of at least 1, or a list of GPUs as in [0, 1]"
        )


def count_processes(options: Mapping[str, Any]) -> int:
    """Ranks that Trainer options ask for, over all nodes."""
    devices = options["devices"]
    if devices in ("auto", -1, "-1"):
        count = torch.cuda.device_count() if on_cuda(options) else 1
    else:
        count = len(named_gpus(devices)) or int(devices)
    return count * options["num_nodes"]


def named_gpus(devices: Any) -> list[int]:
    """GPUs that trainer.devices gives by their numbers, as in [0, 1] or "0,1"; none where it says how many, or auto."""
    if isinstance(devices, list):
        return [int(device) for device in devices]
    return [int(device) for device in str(devices).split(",") if device.strip()] if "," in str(devices) else []


def check_tasks(processes: int, environment: Mapping[str, str] = os.environ) -> None:
    """Raises UsageError where Slurm has started another number of processes than the Trainer's options ask for: they
    would wait for ever, or train several times over.

    Args:
        processes: that trainer.devices and trainer.num_nodes ask for.
    """
    if "SLURM_JOB_ID" not in environment or environment.get(LAUNCHER) == str(os.getppid()):
        return
    by_srun = "SLURM_STEP_ID" in environment or "SLURM_STEPID" in environment
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or 1)
    asked = f"trainer.devices x trainer.num_nodes is {processes}"
    if by_srun and tasks != processes:
        raise UsageError(f"srun started {tasks} tasks, but {asked}: set them so that there is one task for each device")
    if not by_srun and "SLURM_NTASKS" in environment and (tasks > 1 or processes > 1):
        raise UsageError(
            f"started in a Slurm job of {tasks} tasks without srun ({asked}): start it with srun, one task for each "
            "device (slurm/pretrain.sbatch does), or unset SLURM_NTASKS to train on this machine alone"
        )


def as_list(value: Any) -> list[Any]:
    """Lightning's options that are one thing, several or none, as a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def check_callbacks(callbacks: list[Callback]) -> None:
    """Raises UsageError for a callback whose work would be lost or would disturb the recipe's own."""
    for callback in callbacks:
        for name, instead in REFUSED_CALLBACKS.items():
            if isinstance(callback, getattr(lightning_callbacks, name)):
                raise UsageError(f"trainer.callbacks has {type(callback).__name__}: leave it out and use {instead}")


def check_plugins(plugins: list[Any]) -> None:
    """Raises UsageError for a plugin that is no cluster environment."""
    for plugin in plugins:
        if not isinstance(plugin, ClusterEnvironment):
            name = plugin if isinstance(plugin, str) else type(plugin).__name__
            raise UsageError(
                f"trainer.plugins has {name}: expected cluster environments only; precision is trainer.precision, "
                "checkpoints are checkpoint.*"
            )
