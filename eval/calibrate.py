"""Calibrates Block-Sparse FlashAttention (arXiv:2512.07011) on a softmax checkpoint.

    python -m eval.calibrate RUN --data FOLDER --ks 8 16 32 --samples 16 --length 32768 --output thresholds.safetensors

For each layer, head and block of 128 query positions, the threshold that keeps the k best of the earlier blocks of 64
keys beside the diagonal ones, over windows of the corpus's train split; several k at once. What share of the
pairs of query and key that is (predicted), and what share the thresholds keep on windows of the held-out split
(measured), stands in the output and in the file. eval.run and eval.generate take it by --thresholds and --keep_blocks.
"""

from common.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # the imports take seconds

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.command_line import CommandParser
from eval.common.calibrating import calibrating_parser, check_replaceable, open_calibrating, run_calibrating
from eval.common.options import check_least
from eval.common.windows import choose_windows
from model.loading import model_fingerprint
from model.policies.bsfa import BlockSparseFlash, ThresholdCollector, predicted_density
from model.policies.policy import use_policy
from model.policies.thresholds import Calibration, Estimator, read_thresholds, save_thresholds


@dataclass(frozen=True)
class CalibrationConfig:
    """What is calibrated.

    Args:
        ks: Blocks of 64 earlier keys that each block of 128 queries shall keep.
        samples: Windows that are looked at.
        length: Tokens of a window. None takes the checkpoint's training length.
        estimator: "mean" averages the windows' thresholds, as in the paper; "pooled" finds the one threshold that keeps
            k blocks on average over the windows, and comes closer to the predicted density where scores differ much
            between texts.
        measured: Most held-out windows on which the density is measured; 0 leaves that out.
        seed: Of the choice of windows.
        device: "auto" takes CUDA where there is one, else the CPU.
        precision: "auto" is bfloat16 autocast on CUDA for runs trained in bf16, else float32.
    """

    ks: list[int] = field(default_factory=lambda: [8, 16, 32])
    samples: int = 16
    length: int | None = None
    estimator: Estimator = "mean"
    measured: int = 4
    seed: int = 0
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        check_least(self, {"samples": 1, "length": 128, "measured": 0, "seed": 0})


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one "error:" line on stderr."""
    lost = "nothing is written, calibration starts anew"
    return run_calibrating(calibrate, CalibrationConfig, _parser(), arguments, lost)


def _parser() -> CommandParser:
    output = {"default": "thresholds.safetensors", "help": "file of the thresholds"}
    parser = calibrating_parser("calibrate", __doc__, "train and heldout splits", **output)
    default = CalibrationConfig().ks
    parser.add_argument("--ks", nargs="+", type=int, default=default, help="earlier blocks that are kept")
    parser.add_class_arguments(CalibrationConfig, skip={"ks"})
    return parser


def calibrate(run: str, data: Path, output: Path, config: CalibrationConfig) -> list[str]:
    """Writes the file. Returns the lines of a table of densities.

    Raises: FileNotFoundError, ValueError: what cannot be calibrated, and the way out.
    """
    check_replaceable(output, read_thresholds)
    opened = open_calibrating(run, data, config.device, config.precision)
    loaded = opened.loaded
    length = config.length or loaded.training_length
    collector = ThresholdCollector(config.ks, loaded.config.n_layers, config.estimator)
    windows = opened.train_windows(length, config.samples, config.seed, "--length or --samples")
    with use_policy(loaded.model, collector):
        opened.read("train", windows, length, f"calibrating at {length} tokens")
    thresholds = collector.thresholds()

    heldout = choose_windows(opened.store("heldout"), length, config.measured, config.seed)
    measured = []
    for k, one in zip(config.ks, thresholds, strict=True) if heldout else ():
        with use_policy(loaded.model, BlockSparseFlash(k, str(output), one.to(opened.device))) as record:
            opened.read("heldout", heldout, length, f"measuring k = {k}")
        measured.append(float(record.density("prefill").mean()))
    calibration = Calibration(
        model=model_fingerprint(loaded.model),
        checkpoint=str(opened.checkpoint),
        step=loaded.step,
        ks=config.ks,
        length=length,
        samples=config.samples,
        estimator=config.estimator,
        predicted=[predicted_density(k, length) for k in config.ks],
        measured=measured or None,
    )
    save_thresholds(output, thresholds, calibration)
    return table(calibration, len(heldout), output)


def table(calibration: Calibration, n_heldout: int, output: Path) -> list[str]:
    lines = [f"{'k':>6}  density predicted  measured"]
    for i, (k, predicted) in enumerate(zip(calibration.ks, calibration.predicted, strict=True)):
        measured = "       -" if calibration.measured is None else f"{calibration.measured[i]:8.3f}"
        lines.append(f"{k:>6}  {predicted:17.3f}  {measured}")
    where = f"measured on {n_heldout} held-out windows" if n_heldout else "not measured: no held-out window"
    lines.append(
        f"{output}: {calibration.length} tokens, {calibration.samples} samples, {calibration.estimator}; {where}"
    )
    return lines


if __name__ == "__main__":
    sys.exit(main())
