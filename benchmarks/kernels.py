"""Checks, then times entmax attention against its peers, in one process on one GPU.

    python -m benchmarks.kernels                                  # the bar table
    python -m benchmarks.kernels --suite density length --quick
    python -m benchmarks.kernels --suite table --peers flash cudnn adasplash
    python -m benchmarks.kernels --suite checkpoint --qkv qkv.pt  # from python -m benchmarks.dump_qkv
    python -m benchmarks.kernels --suite trained --qkv qkv.pt     # from python -m benchmarks.dump_qkv --layer all

A time is the median over repeats, between CUDA events with a cold L2 cache, of one forward pass that keeps what
gradients need plus the backward pass; "forward ms" is a forward pass alone under no_grad. MiB: peak extra memory of
forward and backward, outputs and gradients included. "/ ours": the row's time over ours. live %: 64 x 64 tiles with
support, of the causal ones. passes: over listed tiles that the thresholds took, mean. The softmax peers compute
another function: their work does not depend on the inputs. Before it is timed, ours is compared with float64: its
last queries over the whole length and all queries of the first 2048 tokens; a wrong result stops the run.
"""

from common.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # the imports take seconds

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
import triton

from benchmarks.measure import CheckFailed, Repeats
from benchmarks.peers import DEFAULT_PEERS, PEERS
from benchmarks.report import Report
from benchmarks.suites import QKV_SUITES, SUITES, Bench
from common.arguments import PlainParser, a_path
from common.errors import user_errors

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = PlainParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--suite", nargs="+", choices=tuple(SUITES), default=["table"], metavar="SUITE",
                        help=f"one or more of {', '.join(SUITES)} (default: table)")  # fmt: skip
    parser.add_argument("--peers", nargs="*", choices=tuple(PEERS), default=list(DEFAULT_PEERS), metavar="PEER",
                        help=f"any of {', '.join(PEERS)}; adasplash is off by default: it tunes itself for 80 to 210 s "
                        "at every new length (then pinned in Triton's cache)")  # fmt: skip
    parser.add_argument(
        "--qkv", nargs="+", type=a_path, default=[], metavar="FILE", help="for the suites checkpoint, trained"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="of all suites but errors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=a_path, default=Path("runs/benchmarks/kernels"), metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="few repeats")
    parser.add_argument("--queued", action="store_true", help="let the host run ahead: device time without launch gaps")
    options = parser.parse_args(arguments)
    if (needing := sorted(set(options.suite) & set(QKV_SUITES))) and not options.qkv:
        parser.error(f"--suite {needing[0]} needs --qkv FILE, made by python -m benchmarks.dump_qkv")
    if missing := [str(path) for path in options.qkv if not path.is_file()]:
        parser.error(f"--qkv: no such file: {', '.join(missing)}")
    return options


def header(options: argparse.Namespace, arguments: Sequence[str]) -> list[str]:
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    adasplash = "installed" if importlib.util.find_spec("adasplash") else "not installed"
    timing = f"{'quick' if options.quick else 'full'} repeats{', queued' if options.queued else ''}"
    return [
        f"{gpu.name}, {gpu.multi_processor_count} multiprocessors, {gpu.total_memory / 2**30:.0f} GiB; "
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, Triton {triton.__version__}; {options.dtype}, causal, "
        f"batch 1; {timing}; {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        f"command: python -m benchmarks.kernels {shlex.join(arguments)}".rstrip(),
        f"peers not asked for: {', '.join(sorted(set(PEERS) - set(options.peers))) or 'none'}; "
        f"AdaSplash-2: {adasplash}",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 after a failed check, 2 without a CUDA device."""
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("error: python -m benchmarks.kernels needs a CUDA device, and torch finds none", file=sys.stderr)
        return 2
    report = Report(options.output, header(options, sys.argv[1:] if arguments is None else arguments))
    repeats = Repeats.quick(options.queued) if options.quick else Repeats(queued=options.queued)
    bench = Bench(report, repeats, options.peers, DTYPES[options.dtype], options.seed, options.qkv)
    for suite in options.suite:
        try:
            SUITES[suite](bench)
        except CheckFailed as error:
            report.line(f"error: check failed, nothing after it was timed: suite {suite}: {error}")
            print(f"error: {error}", file=sys.stderr)
            return 1
    print(f"\ntext, CSV and plots: {options.output}")
    return 0


if __name__ == "__main__":
    with user_errors():
        sys.exit(main())
