"""Generation speed on one GPU: prefill and decoding in tokens/s, by attention and length of the cache.

    python -m benchmarks.decode_speed                                   # 125m, softmax and entmax, 4K, 32K, 128K
    python -m benchmarks.decode_speed --rows 16 --lengths 4096          # 16 texts at once
    python -m benchmarks.decode_speed --kinds entmax --backend torch    # another backend of kernels.entmax_attention
    python -m benchmarks.decode_speed --cuda_graphs                     # decoding steps captured
    python -m benchmarks.decode_speed --kinds softmax --positions rope --evict pyramidkv ada_snapkv h2o --keep 0.2
    python -m benchmarks.decode_speed --runs runs/softmax runs/asentmax --data prepared/source-tree    # as trained

The model has random weights in bfloat16. Prefill: --rows prompts of `length` random tokens, in chunks, after an untimed
pass over the same, in which everything compiles. Decoding: the median step, of one token a row, that continues the
filled cache and takes the likeliest token of its logits. Fresh entmax weights are nearly uniform, so that nearly every
tile has support, entmax's slowest case: --runs takes checkpoints, their weights in bfloat16 too, and prompts from
held-out documents, each inside one. Cache: the bytes of keys and values that decoding holds, its room for further
tokens included; decode GiB: the most that was allocated while decoding, weights included.

--evict: softmax models that evict keys too, down to --keep of the prompt's (model/inference/evicting.py), kernel by
kernel.
"""

from common.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # the imports take seconds

import argparse
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

from benchmarks.report import write_csv
from benchmarks.train_speed import CONFIGS, KINDS, network
from benchmarks.trained_steps import open_runs, windows
from common.arguments import PlainParser, a_count, a_path
from common.errors import user_errors
from eval.common.options import check_output_file
from model.config import ModelConfig, Positions
from model.inference.decoding import STEPS_BEFORE_CAPTURE, Decoder
from model.inference.evicting import evicting
from model.inference.incremental import make_cache, prefill
from model.loading import load_model
from model.policies.eviction import EvictingPolicy
from model.policies.families import policy_at
from model.transformer import Transformer

T = TypeVar("T")
Values = dict[str, float]
Prompts = list[list[int]]
DEVICE = "cuda"
NAME = 20  # columns of the table: of runs too
EVICTING = ["pyramidkv", "ada_snapkv", "h2o"]  # of model/policies/families.py: heads that share keys evict the same
WARM_UP = STEPS_BEFORE_CAPTURE + 3  # decoding steps


@dataclass
class Row:
    """One line of the table. decode_per_second: tokens/s of all rows together."""

    model: str
    attention: str
    positions: str
    length: int
    rows: int
    prefill_per_second: float | None = None
    decode_per_second: float | None = None
    step_ms: float | None = None
    peak_gib: float | None = None
    cache_mib: float | None = None
    decode_gib: float | None = None
    note: str = ""


def build(config: ModelConfig, device: torch.device) -> Transformer:
    torch.manual_seed(0)
    with device:
        return Transformer(config).to(torch.bfloat16).eval()


def timed(device: torch.device, work: Callable[..., T], *arguments: Any) -> tuple[float, T]:
    """Seconds, and what it returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = work(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def random_prompts(model: Transformer, rows: int, length: int) -> Prompts:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (rows, length), generator=generator).tolist()  # type: ignore[no-any-return]


def measure(model: Transformer, prompts: Prompts, chunk_tokens: int, steps: int, cuda_graphs: bool) -> Values:
    """The measured fields of a Row, but for the peaks of memory. prompts: of one length."""
    device = model.embedding.weight.device
    rows, length = len(prompts), len(prompts[0])
    cache = make_cache(model, rows, length + WARM_UP + steps)
    decoder = Decoder(model, cache, cuda_graphs)

    def decode(tokens: list[int]) -> list[int]:
        return likeliest(model, decoder(tokens))

    for _ in range(2):
        for row in range(rows):
            cache.truncate(row, 0)
        prefill_seconds, hidden = timed(device, prefill, model, prompts, cache, chunk_tokens)
    decoded = decoding(decode, likeliest(model, hidden), device, steps)
    return rates(rows, length, prefill_seconds, cache.nbytes, decoded)


def measure_evicting(
    model: Transformer, prompt: list[int], name: str, keep: float, chunk_tokens: int, steps: int
) -> Values:
    """As `measure`, of one row under the eviction policy of this name."""
    device, length = model.embedding.weight.device, len(prompt)
    policy = policy_at(name, keep, length)
    assert isinstance(policy, EvictingPolicy)
    for _ in range(2):
        with evicting(model, policy) as cache:
            prefill_seconds, hidden = timed(device, cache.prefill, prompt, chunk_tokens)

            def decode(tokens: list[int]) -> list[int]:
                return likeliest(model, cache.extend(torch.tensor([tokens], device=device))[:, 0])  # noqa: B023

            decoded = decoding(decode, likeliest(model, hidden), device, steps)
        held = cache.nbytes
    return rates(1, length, prefill_seconds, held, decoded)


def rates(rows: int, length: int, prefill_seconds: float, held: int, decoded: Values) -> Values:
    """A Row's fields. decoded: as `decoding` gives it."""
    per_second = dict(
        prefill_per_second=rows * length / prefill_seconds, decode_per_second=1e3 * rows / decoded["step_ms"]
    )
    return {**per_second, **decoded, "cache_mib": held / 2**20}


def decoding(decode: Callable[[list[int]], list[int]], tokens: list[int], device: torch.device, steps: int) -> Values:
    """step_ms of decoding `tokens` on, and on CUDA the peaks of memory, before and during it."""
    peaks: Values = {}
    if device.type == "cuda":
        peaks["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(WARM_UP + steps):
        step_seconds, tokens = timed(device, decode, tokens)
        seconds.append(step_seconds)
    if device.type == "cuda":
        peaks["decode_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        peaks["peak_gib"] = max(peaks.values())
    return dict(step_ms=1e3 * statistics.median(seconds[WARM_UP:]), **peaks)


@torch.no_grad()
def likeliest(model: Transformer, hidden: Tensor) -> list[int]:
    """hidden: (B, C). Returns B token ids."""
    return model.logits(hidden).argmax(-1).tolist()  # type: ignore[no-any-return]


def fill(row: Row, measured: Callable[[], Values]) -> Row:
    """Measures a row on the GPU; out of memory is a result too."""
    torch.cuda.reset_peak_memory_stats()
    try:
        row = replace(row, **measured())  # type: ignore[arg-type]
    except torch.cuda.OutOfMemoryError:
        row = replace(row, note="out of memory")
    gc.collect()
    torch.cuda.empty_cache()
    return row


def show(row: Row) -> None:
    def cell(value: float | None, width: int, digits: int) -> str:
        return "-".rjust(width) if value is None else f"{value:{width},.{digits}f}"

    print(
        f"{row.model:{NAME}} {row.attention:10} {row.positions:5} {row.length:>7} {row.rows:>4} "
        f"{cell(row.prefill_per_second, 14, 0)} {cell(row.decode_per_second, 13, 1)} {cell(row.step_ms, 8, 2)} "
        f"{cell(row.peak_gib, 9, 1)} "
        f"{cell(row.cache_mib, 9, 1)} {cell(row.decode_gib, 10, 2)}  {row.note}",
        flush=True,
    )


def parse() -> argparse.Namespace:
    parser = PlainParser(prog="python -m benchmarks.decode_speed", description=__doc__)
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    parser.add_argument("--models", nargs="+", choices=names, help="of random weights; default: 125m")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="default: softmax and entmax")
    parser.add_argument("--positions", nargs="+", choices=get_args(Positions), help="default: nape")
    parser.add_argument("--runs", nargs="+", default=[], metavar="RUN", help="checkpoints in place of --models")
    parser.add_argument("--data", type=a_path, help="prepared corpus of --runs, whose held-out documents are read")
    parser.add_argument("--lengths", nargs="+", type=a_count, default=[4096, 32768, 131072], help="tokens in the cache")
    parser.add_argument("--rows", type=a_count, default=1, help="texts at once")
    parser.add_argument("--evict", nargs="+", choices=EVICTING, default=[], help="policies, beside no eviction")
    parser.add_argument("--keep", type=float, default=0.2, help="share of the prompt's keys that --evict keeps")
    parser.add_argument("--chunk_tokens", type=a_count, default=8192, help="prompt tokens of one forward pass")
    parser.add_argument("--steps", type=a_count, default=20, help="timed decoding steps")
    parser.add_argument("--backend", default="auto", help="of kernels.entmax_attention")
    parser.add_argument("--cuda_graphs", action="store_true", help="decode by CUDA graphs")
    parser.add_argument("--output", type=a_path, default=Path("runs/benchmarks/decode_speed.csv"))
    options = parser.parse_args()
    if not 0 < options.keep <= 1:
        parser.error(f"--keep is {options.keep}: expected a share in (0, 1]")
    if options.runs and (options.models or options.kinds or options.positions or options.backend != "auto"):
        parser.error("--runs brings models of its own: leave out --models, --kinds, --positions and --backend")
    if options.data and not options.runs:
        parser.error(f"--data is {options.data}, but only --runs reads it: name runs, or leave it out")
    options.models = options.models or ["125m"]
    options.kinds, options.positions = options.kinds or ["softmax", "entmax"], options.positions or ["nape"]
    if options.evict and not options.runs and "softmax" not in options.kinds:
        parser.error(f"--evict is {' '.join(options.evict)}, but --kinds has no softmax: its models evict alone")
    check_output_file(options.output)
    return options


class Fresh:
    """Models of random weights, and prompts of random tokens."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device = options, device

    def models(self) -> Iterator[tuple[str, Transformer]]:
        """By name, one after another."""
        options = self.options
        for name, kind, positions in itertools.product(options.models, options.kinds, options.positions):
            config = network(name, kind)
            attention = replace(config.attention, backend=options.backend)
            yield name, build(replace(config, positions=positions, attention=attention), self.device)

    def prompts(self, model: Transformer, length: int) -> Prompts:
        return random_prompts(model, self.options.rows, length)


class Trained:
    """Checkpoints, and prompts of held-out documents.

    Raises FileNotFoundError, ValueError: as trained_steps.open_runs and windows.
    """

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.subjects, self.store = open_runs(options.runs, options.data)
        kinds = [subject.checkpoint.architecture.attention for subject in self.subjects]
        if options.evict and not any(kind.is_softmax for kind in kinds):
            raise ValueError(
                f"--evict is {' '.join(options.evict)}, but --runs are {', '.join(kind.kind for kind in kinds)}: "
                "softmax models evict alone"
            )
        self.rows, self.device = options.rows, device
        for length in options.lengths:
            windows(self.store, length, self.rows, "--lengths or --rows")

    def models(self) -> Iterator[tuple[str, Transformer]]:
        for subject in self.subjects:
            yield subject.label, load_model(subject.checkpoint.path, self.device).model.to(torch.bfloat16).eval()

    def prompts(self, model: Transformer, length: int) -> Prompts:
        return [
            self.store.document(document)[start : start + length].tolist()
            for document, start in windows(self.store, length, self.rows)
        ]


def main() -> int:
    """Returns the exit code: 0, or 2 without a CUDA device."""
    options = parse()
    if not torch.cuda.is_available():
        print("error: python -m benchmarks.decode_speed needs a CUDA device, and torch finds none", file=sys.stderr)
        return 2
    device = torch.device(DEVICE)
    try:
        measured = Trained(options, device) if options.runs else Fresh(options, device)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    launched = "CUDA graphs" if options.cuda_graphs else "kernel by kernel"
    backend = "of the runs" if options.runs else options.backend
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, backend {backend}, {launched}")
    head = "attention  pos.  length rows prefill tok/s  decode tok/s  step ms  peak GiB cache MiB decode GiB"
    print("model".ljust(NAME), head)
    rows: list[Row] = []
    for name, model in measured.models():
        kind = model.config.attention.kind
        policies = options.evict if kind == "softmax" else []
        for length, policy in itertools.product(options.lengths, ["", *policies]):
            prompts = measured.prompts(model, length)
            row = Row(name, policy or kind, model.config.positions, length, 1 if policy else options.rows)
            own = partial(measure, model, prompts, cuda_graphs=options.cuda_graphs)
            evicted = partial(measure_evicting, model, prompts[0], policy, options.keep)
            work = partial(evicted if policy else own, chunk_tokens=options.chunk_tokens, steps=options.steps)
            rows.append(fill(row, work))
            show(rows[-1])
            write_csv([asdict(row) for row in rows], options.output)  # each time: what fails later takes none with it
        del model, own, evicted, work  # before the next one is loaded
    return 0


if __name__ == "__main__":
    with user_errors():
        sys.exit(main())
