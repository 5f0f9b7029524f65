"""Options of train.py beside those of data, model and Lightning's Trainer."""

from lightning.pytorch.cli import LightningArgumentParser

from common.wandb_config import WandbConfig
from training.callbacks.checkpointing import CheckpointConfig
from training.callbacks.metrics import StatsConfig, ValidationConfig
from training.callbacks.profiling import ProfileConfig
from training.distributed.config import ParallelConfig
from training.faults.interruption import InterruptionConfig
from training.faults.step_guard import GuardConfig
from training.faults.watchdog import WatchdogConfig


def add_run_arguments(parser: LightningArgumentParser, *, needs_run_dir: bool) -> None:
    """Add them to train.py's parser. needs_run_dir: --run_dir has to be given."""
    parser.add_argument(
        "--run_dir", type=str if needs_run_dir else str | None, required=needs_run_dir,
        help="Folder of the run: checkpoints, metrics, config.",
    )  # fmt: skip
    parser.add_argument(
        "--resume",
        type=str,
        default="none",
        help="none, auto (newest complete checkpoint of run_dir that its checksums fit) or a path.",
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
        help='Options in which a run that resumes may leave its learning-rate schedule, "[trainer.max_steps]", or its '
        'teacher, "[model.distill.teacher]".',
    )
    parser.add_argument(
        "--trainer.max_tokens",
        type=int | float | None,
        default=None,
        help="Tokens to train on, in place of max_steps: rounded up to whole optimizer steps.",
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
