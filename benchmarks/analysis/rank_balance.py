"""How long data-parallel ranks wait for each other where documents have different lengths.

    python -m benchmarks.analysis.rank_balance                       # by cost, on any machine
    python -m benchmarks.analysis.rank_balance --measured --model 125m --attention softmax --longest 32768 --steps 4

Documents of log-uniform length between --shortest and --longest tokens are packed into sequences of --longest tokens.
Each step's sequences go to the ranks in their order, and shared out by cost as data.balance_ranks does. A row is the
share of the ranks' time in which they wait for the slowest, mean over steps: of a step (DDP, ZeRO stages 1 and 2), and
of each micro-batch (stage 3). By cost: FLOPs of training (model.flops.sequence_cost). --measured: sequences are shared
out by cost, and what they take is timed, one after another on one GPU, forward, backward and optimizer step each.
"""

from common.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # the imports take seconds

import argparse
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.train_speed import CONFIGS, KINDS, Trial, network
from common.arguments import PlainParser
from common.errors import UsageError, run_command
from data.balance import idle_share, share_out
from model.flops import sequence_cost


def packed_documents(sequences: int, shortest: int, longest: int, seed: int) -> list[NDArray[np.int64]]:
    """Lengths of the documents in each sequence of `longest` tokens, as packing cuts them."""
    generator = np.random.default_rng(seed)
    found: list[NDArray[np.int64]] = []
    left, lengths = longest, []
    while len(found) < sequences:
        document = int(np.exp(generator.uniform(np.log(shortest), np.log(longest + 1))))
        while document and len(found) < sequences:
            lengths.append(piece := min(document, left))
            document, left = document - piece, left - piece
            if not left:
                found.append(np.array(lengths, np.int64))
                left, lengths = longest, []
    return found


def measured_seconds(model: str, kind: str, sequences: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
    """(sequences,) of a step on each one alone, the faster of two."""
    trial = Trial(network(model, kind), "auto", 1, dict(compile=True))
    trial.compile_for_any_length()
    seconds = np.full(len(sequences), np.inf)
    for _ in range(2):  # kernels compile in the first
        for i, lengths in enumerate(sequences):
            batch = trial.packed_batch(lengths.tolist())
            torch.cuda.synchronize()
            start = time.perf_counter()
            trial.step(batch)
            torch.cuda.synchronize()
            seconds[i] = min(seconds[i], time.perf_counter() - start)
    return seconds


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = PlainParser(prog="python -m benchmarks.analysis.rank_balance", description=__doc__)
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    parser.add_argument("--model", choices=names, default="1b")
    parser.add_argument("--attention", choices=KINDS, default="softmax")
    parser.add_argument("--shortest", type=int, default=1024, help="tokens of a document, at least")
    parser.add_argument("--longest", type=int, default=131072, help="tokens of a document, at most, and of a sequence")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--global_batch_size", type=int, default=32, help="sequences of a step")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--measured", action="store_true", help="time sequences on this GPU")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if not 1 <= options.shortest <= options.longest:
        parser.error(f"--shortest is {options.shortest}: expected 1 to --longest ({options.longest})")
    if options.seed < 0:
        parser.error(f"--seed is {options.seed}: expected at least 0")
    for name in ("ranks", "global_batch_size", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}: expected at least 1")
    if options.global_batch_size % options.ranks:
        parser.error(f"--global_batch_size is {options.global_batch_size}: expected a multiple of --ranks")
    return options


def report(arguments: Sequence[str]) -> Iterator[str]:
    options = parse(arguments)
    if options.measured and not torch.cuda.is_available():
        raise UsageError("--measured needs a CUDA device, and torch finds none: leave it out")
    config, batch = network(options.model, options.attention), options.global_batch_size
    sequences = packed_documents(options.steps * batch, options.shortest, options.longest, options.seed)
    costs = np.array([sequence_cost(config, lengths) for lengths in sequences])
    times = measured_seconds(options.model, options.attention, sequences) if options.measured else costs
    how = f"times on one {torch.cuda.get_device_name()}" if options.measured else "times by FLOPs"
    yield f"{options.model} {options.attention}, {options.ranks} ranks, {options.steps} steps; {how}"
    yield f"{batch} sequences of {options.longest:,} tokens a step, documents from {options.shortest:,} tokens on"
    yield f"most expensive sequence: {times.max() / times.min():.2f} times the cheapest"
    yield "waiting            of a step  of each micro-batch"
    for name, balanced in (("in their order", False), ("shared by cost", True)):
        idle = []
        for first in range(0, len(costs), batch):
            step = costs[first : first + batch]
            shares = share_out(step if balanced else np.ones(batch), options.ranks, 1)
            idle.append([idle_share(times[first : first + batch], shares, each) for each in (False, True)])
        of_step, of_micro_batch = 100 * np.mean(idle, axis=0)
        yield f"{name:18} {of_step:8.2f} % {of_micro_batch:19.2f} %"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return run_command(report, arguments)


if __name__ == "__main__":
    sys.exit(main())
