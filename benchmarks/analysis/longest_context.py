"""The longest context that trains, by number of GPUs, as `python -m training.memory` estimates it.

    python -m benchmarks.analysis.longest_context                      # 1b and 8b on 1 to 64 GPUs of 80 GB
    python -m benchmarks.analysis.longest_context --models 30m --gpus 1 2 --gib 24

One sequence a group of GPUs that share it: all of them up to the model's query heads, several groups beyond.
bf16-mixed, AdamW, activation_checkpointing offload, mlp_tile_tokens 16384, Liger's loss; compiled with ZeRO stage 1,
eager with stage 3, whichever takes more. Lengths are powers of two up to 4,194,304, and those times 1.5. --reserve GiB
of each GPU are left for CUDA, NCCL and fragmentation. host: pinned memory of a node of 8 GPUs, for the blocks' inputs.
Needs no GPU; takes a minute and a half.
"""

from common.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # the imports take seconds

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.train_speed import CONFIGS, network
from common.arguments import PlainParser
from common.errors import user_errors
from model.config import ModelConfig
from training.memory.estimate import Estimate, estimate
from training.memory.setup import Setup
from training.throughput import GIB

MOST = 2**22
LENGTHS = sorted({size * 2**power // 2 for power in range(12, 23) for size in (2, 3) if size * 2**power <= 2 * MOST})
GPUS_OF_A_NODE = 8


@dataclass(frozen=True)
class Longest:
    """tokens: None where not even the shortest fits. gib: of each GPU. host_gib: of a node."""

    tokens: int | None
    zero_stage: int = 0
    gib: float = 0.0
    host_gib: float = 0.0


def longest(config: ModelConfig, gpus: int, room: float) -> Longest:
    """room: bytes of a GPU."""
    best = Longest(None)
    for stage in (1, 3):
        for tokens, found in _fitting(config, gpus, stage, room):
            if tokens > (best.tokens or 0):
                pinned = sum(part.bytes for part in found.host.values()) * min(gpus, GPUS_OF_A_NODE)
                best = Longest(tokens, stage, found.total / GIB, pinned / GIB)
    return best


def _fitting(config: ModelConfig, gpus: int, stage: int, room: float) -> Iterator[tuple[int, Estimate]]:
    """Lengths that fit."""
    for tokens in LENGTHS:
        found = estimate(
            Setup(
                config, tokens, tokens, ranks=gpus, sequence_parallel=min(gpus, config.n_heads), zero_stage=stage,
                precision="bf16-mixed", activation_checkpointing="offload", mlp_tile_tokens=16384, loss_backend="liger",
                compiled=stage < 3,
            )
        )  # fmt: skip
        if found.total <= room:  # past 131,072 tokens entmax keeps less: a longer context may fit where that does not
            yield tokens, found


def parse() -> argparse.Namespace:
    parser = PlainParser(prog="python -m benchmarks.analysis.longest_context", description=__doc__)
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    parser.add_argument("--models", nargs="+", choices=names, default=["1b", "8b"])
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64], help="powers of two")
    parser.add_argument("--gib", type=float, default=79.0, help="memory of a GPU; an H100 of 80 GB has 79 GiB")
    parser.add_argument("--reserve", type=float, default=5.0)
    return parser.parse_args()


def main() -> int:
    """Prints the table of docs/many_gpus.md."""
    options = parse()
    for gpus in options.gpus:
        if gpus < 1 or gpus & (gpus - 1):
            raise ValueError(
                f"--gpus has {gpus}: expected powers of two, so that they can share the heads of a sequence"
            )
    if not 0 <= options.reserve < options.gib < math.inf:
        raise ValueError(
            f"--gib is {options.gib} and --reserve {options.reserve}: expected a GPU's memory, and less of it to leave"
        )
    room = (options.gib - options.reserve) * GIB
    kinds = ("softmax", "asentmax")
    print("| GPUs | " + " | ".join(f"{name}, {kind}" for name in options.models for kind in kinds) + " |")
    print("|---:|" + "---:|" * (len(options.models) * len(kinds)))
    for gpus in options.gpus:
        cells = [cell(longest(network(name, kind), gpus, room)) for name in options.models for kind in kinds]
        print(f"| {gpus} | " + " | ".join(cells) + " |")
    return 0


def cell(found: Longest) -> str:
    if found.tokens is None:
        return "-"
    more = "at least " if found.tokens == MOST else ""
    return f"{more}{found.tokens:,} (stage {found.zero_stage}, host {found.host_gib:,.0f} GiB)"


if __name__ == "__main__":
    with user_errors():
        sys.exit(main())
