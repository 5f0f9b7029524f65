"""Searches MInference's pattern for each head of a softmax checkpoint (arXiv:2407.02490).

    python -m eval.search_patterns RUN --data FOLDER --density 0.1 --output patterns.safetensors
    python -m eval.search_patterns RUN --data FOLDER --refine_length 32768 --least_recall 0.9

Over windows of the corpus's train split each head gets, of patterns that read about as many keys (first and last ones;
lines along keys and along distances, in five mixtures; blocks), the one that keeps most of its exact attention's
weight. With --refine_length, budgets of heads that keep less than --least_recall of it there are raised, as for
Qwen2.5-1M (arXiv:2501.15383). eval.sparse_frontier takes the file by --patterns.
"""

from common.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # the imports take seconds

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from common.command_line import CommandParser
from eval.common.calibrating import (
    Calibrating,
    calibrating_parser,
    check_replaceable,
    open_calibrating,
    run_calibrating,
)
from eval.common.options import check_least
from model.loading import model_fingerprint
from model.policies.head_patterns import (
    KINDS,
    Calibration,
    HeadPatterns,
    RecallCollector,
    best_patterns,
    candidates,
    raised,
    read_patterns,
    save_patterns,
)
from model.policies.policy import use_policy


@dataclass(frozen=True)
class SearchConfig:
    """What is searched.

    Args:
        density: Share of the visible pairs of query and key that the patterns read, about, at `length`; at most 0.5.
        samples: Windows that are looked at.
        length: Tokens of a window. None takes the checkpoint's training length.
        refine_length: Tokens of the windows on which budgets are raised; None leaves them.
        least_recall: Share of the attention's weight that every head is to keep there. None: 0.9.
        seed: Of the choice of windows.
        device: "auto" takes CUDA where there is one, else the CPU.
        precision: "auto" is bfloat16 autocast on CUDA for runs trained in bf16, else float32.
    """

    density: float = 0.1
    samples: int = 4
    length: int | None = None
    refine_length: int | None = None
    least_recall: float | None = None
    seed: int = 0
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        check_least(self, {"samples": 1, "length": 128, "refine_length": 128, "seed": 0})
        if self.least_recall is not None and not 0 < self.least_recall < 1:
            raise ValueError(f"least_recall is {self.least_recall}: expected a share between 0 and 1")
        if self.least_recall is not None and self.refine_length is None:
            raise ValueError(f"least_recall is {self.least_recall}, but refine_length is not set: set that too")

    @property
    def least(self) -> float:
        """The least recall."""
        return 0.9 if self.least_recall is None else self.least_recall


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one "error:" line on stderr."""
    lost = "nothing is written, the search starts anew"
    return run_calibrating(search, SearchConfig, _parser(), arguments, lost)


def _parser() -> CommandParser:
    output = {"default": "patterns.safetensors", "help": "file of the patterns"}
    parser = calibrating_parser("search_patterns", __doc__, **output)
    parser.add_class_arguments(SearchConfig)
    return parser


def search(run: str, data: Path, output: Path, config: SearchConfig) -> list[str]:
    """Writes the file. Returns the lines of a table of patterns.

    Raises: FileNotFoundError, ValueError: what cannot be searched, and the way out.
    """
    check_replaceable(output, read_patterns)
    opened = open_calibrating(run, data, config.device, config.precision)
    length = config.length or opened.loaded.training_length
    tried, network = candidates(config.density, length), opened.loaded.config
    alike = [HeadPatterns.everywhere(one, network.n_layers, network.n_heads) for one in tried]
    policy, kept, reads = best_patterns(recall_of(alike, opened, config, length), tried, str(output))
    if config.refine_length is not None:
        policy, kept, reads = refine(policy, opened, config, config.refine_length)
    calibration = Calibration(
        model=model_fingerprint(opened.loaded.model),
        checkpoint=str(opened.checkpoint),
        step=opened.loaded.step,
        density=config.density,
        length=length,
        samples=config.samples,
        least_recall=None if config.refine_length is None else config.least,
        refined_length=config.refine_length,
        recall=float(kept.mean()),
        reached=float(reads.mean()),
    )
    save_patterns(output, policy, calibration)
    return table(policy, kept, reads, calibration, output)


def recall_of(
    policies: Sequence[HeadPatterns], opened: Calibrating, config: SearchConfig, length: int
) -> RecallCollector:
    """What they keep of the samples of this length."""
    windows = opened.train_windows(length, config.samples, config.seed, "--length, --refine_length or --samples")
    network = opened.loaded.config
    collector = RecallCollector(policies, network.n_layers, network.n_heads)
    with use_policy(opened.loaded.model, collector):
        opened.read("train", windows, length, f"attention over {length} tokens")
    return collector


def refine(
    policy: HeadPatterns, opened: Calibrating, config: SearchConfig, length: int
) -> tuple[HeadPatterns, Tensor, Tensor]:
    """Patterns with budgets that keep enough in texts of this length, what they keep and what they read, (L, H)."""
    while True:
        collected = recall_of([policy], opened, config, length)
        more = raised(policy, collected.recall[0], config.least, length)
        if torch.equal(more.sizes, policy.sizes):  # enough everywhere, or all of the text
            return policy, collected.recall[0], collected.density[0]
        policy = more


def table(policy: HeadPatterns, recall: Tensor, reads: Tensor, calibration: Calibration, output: Path) -> list[str]:
    """recall, reads: (L, H)."""
    lines = ["pattern         heads  median sizes  density  recall: mean  least"]
    for kind, name in enumerate(KINDS):
        heads = policy.kinds == kind
        if heads.any():
            sizes = " ".join(f"{int(n):,}" for n in policy.sizes[heads].median(0).values)
            mean, least = recall[heads].mean(), recall[heads].min()
            density = f"{reads[heads].mean():8.3f}"
            lines.append(f"{name:<14} {int(heads.sum()):>6} {sizes:>13} {density} {mean:>13.3f} {least:>6.3f}")
    length = calibration.refined_length or calibration.length
    lines.append(
        f"{output}: density {calibration.reached:.3f}, recall {calibration.recall:.3f} over {calibration.samples} "
        f"samples of {length} tokens"
    )
    return lines


if __name__ == "__main__":
    sys.exit(main())
