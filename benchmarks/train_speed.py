"""Training speed on one GPU: tokens/s, MFU and peak memory of whole optimizer steps, by model, attention and length.

    python -m benchmarks.train_speed                                     # 1b, softmax and asentmax, 4K to 32K
    python -m benchmarks.train_speed --models 125m --kinds asentmax --lengths 4096
    python -m benchmarks.train_speed --lengths 32768 131072 --checkpointing full selective offload --steps 2
    python -m benchmarks.train_speed --models 1b --longest 131072 262144  # which of these contexts train at all
    python -m benchmarks.train_speed --lengths 4096 --float8 none rowwise tensorwise  # 1b in bf16 and in FP8
    python -m benchmarks.train_speed --kinds softmax --lengths 4096 32768 --peers litgpt  # LitGPT's step too
    python -m benchmarks.train_speed --kinds softmax --lengths 4096 --profile 25  # and its slowest kernels
    python -m benchmarks.train_speed --lengths --longest 262144 --sequence_parallel 2  # one rank of two, by itself
    python -m benchmarks.train_speed --runs runs/softmax runs/asentmax --data prepared/source-tree --lengths 32768
    PYTORCH_ALLOC_CONF=expandable_segments:True python -m ...             # where much is reserved and not allocated

A step is forward, backward, clipping and fused AdamW on --tokens random tokens in sequences of one document, with
freshly initialised weights: bf16 autocast over float32 weights, blocks compiled, softmax by FlashAttention-4 where it
is installed (--flash_attention). A row is the median over --steps steps after two to warm up (--longest: one step after
another, in which kernels compile). mode: model.activation_checkpointing. MFU: training.throughput.speed_metrics, in FP8
beside bfloat16's peak too. live %: 64 x 64 tiles with support, mean over layers and heads. Fresh entmax weights are
nearly uniform, so that nearly every tile is live: --runs steps trained checkpoints on held-out documents, with their
own sparsity, at a learning rate of 0.
With --sequence_parallel S a row is of one rank among S GPUs that share each sequence: its memory and MFU, and the
tokens/s of all S together, less the time of exchanges (benchmarks/loopback.py).
"""

from common.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # the imports take seconds

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from torch import Tensor

from benchmarks.loopback import first_rank
from benchmarks.report import write_csv
from benchmarks.step_profile import kernel_lines, profile_step
from common.arguments import PlainParser, a_count, a_path
from common.errors import user_errors
from eval.common.options import check_output_file
from model import flash_attention
from model.attention_stats import attention_stats
from model.config import TRAINED_SPARSE, AttentionConfig, ModelConfig
from model.flops import peak_flops
from training.distributed.engine import PlainEngine
from training.module import FlashAttention, LanguageModule
from training.step.activations import ActivationCheckpointing
from training.step.float8 import Float8, check_device, check_installed
from training.step.loss import resolve_loss_backend
from training.step.optim import OptimizerConfig, build_optimizer
from training.throughput import peak_memory_gib, speed_metrics

KINDS = ("softmax", "ssmax", "entmax", "asentmax", "nsa", "dsa", "dms", "hierarchical")
CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "models"


@dataclass
class Row:
    model: str
    attention: str
    float8: str
    checkpointing: str
    tokens: int
    length: int
    tokens_per_second: float | None
    mfu: float | None
    step_ms: float | None
    peak_gib: float | None
    live_percent: float | None
    note: str = ""


def network(model: str, kind: str) -> ModelConfig:
    values = yaml.safe_load((CONFIGS / f"{model}.yaml").read_text())["model"]["network"]
    sizes: dict[str, Any] = {}
    if kind in TRAINED_SPARSE:
        file = CONFIGS.parent / "attention" / f"{kind}.yaml"
        given = yaml.safe_load(file.read_text())["model"]["network"]["attention"].get(kind, {})
        sizes[kind] = TRAINED_SPARSE[kind](**given)
    return ModelConfig(**values, attention=AttentionConfig(kind=kind, **sizes))  # type: ignore[arg-type]


def random_batch(config: ModelConfig, tokens: int, lengths: Sequence[int], length: int) -> dict[str, Any]:
    """A micro-batch of documents of these lengths, in sequences of `length` tokens."""
    ids = torch.randint(config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    samples = torch.arange(tokens // length)
    return dict(tokens=ids, labels=ids.roll(-1), cu_seqlens=bounds, max_seqlen=length, sample_ids=samples)


class Trial:
    """One model in training on the GPU. ranks: that share a sequence; options: of LanguageModule."""

    def __init__(self, config: ModelConfig, loss_backend: str, ranks: int, options: dict[str, Any]) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.config, self.ranks = config, ranks
        with self.device:
            self.module = LanguageModule(self.config, OptimizerConfig(), **options)
        self.module.loss_backend = resolve_loss_backend(loss_backend, self.device)
        flash_attention.deactivate()  # of the trial before
        told = None
        if self.module.flash_attention == "auto":
            told = flash_attention.activate([config], self.device, torch.bfloat16, ranks, self.module.compiled)
        if told:
            print(told, flush=True)
        self.optimizer, _ = build_optimizer(self.module.model, OptimizerConfig(), total_steps=1000, fused=True)
        self.engine = PlainEngine(self.module.model)

    def step(self, batch: dict[str, Any]) -> None:
        moved = {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            loss = self.module.training_step(moved, 0)["loss"]
        loss.backward()
        self.engine.clip_gradients(1.0, self.engine.gradient_norm())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.ranks == 1)  # among ranks DDP's buckets stay

    def batch(self, tokens: int, length: int) -> dict[str, Any]:
        """Each document fills a sequence."""
        self.module.shards = first_rank(self.config, self.ranks, tokens)
        lengths = [length] * (tokens // length)
        return self.module.on_before_batch_transfer(random_batch(self.config, tokens, lengths, length), 0)

    def packed_batch(self, lengths: Sequence[int]) -> dict[str, Any]:
        """One sequence of several documents."""
        tokens = sum(lengths)
        return self.module.on_before_batch_transfer(random_batch(self.config, tokens, lengths, tokens), 0)

    def compile_for_any_length(self) -> None:
        """torch.compile makes lengths symbolic when it sees the second one."""
        for length in (2048, 4096, 8192):
            self.step(self.batch(length, length))

    def measure(self, tokens: int, length: int, steps: int, warm_up: int) -> dict[str, float]:
        batch = self.batch(tokens, length)
        for _ in range(warm_up):
            self.step(batch)
        torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(steps):
            torch.cuda.synchronize()
            start = time.perf_counter()
            self.step(batch)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        step = statistics.median(seconds)
        peak = peak_flops(torch.cuda.get_device_name(), torch.bfloat16)
        speed = speed_metrics(tokens=tokens, flops=batch["flops"], steps=1, seconds=step, devices=1, peak=peak)
        return dict(
            tokens_per_second=speed["throughput/tokens_per_second"], mfu=speed.get("throughput/mfu"),  # type: ignore
            step_ms=1e3 * step, peak_gib=peak_memory_gib(self.device),
        )  # fmt: skip

    def profile(self, tokens: int, length: int, count: int) -> None:
        """Prints the `count` slowest kernels of a step like those that were timed."""
        batch = self.batch(tokens, length)
        print("\n".join(kernel_lines(profile_step(lambda: self.step(batch), self.device), count)), flush=True)

    def sample(self, length: int) -> Tensor:
        """A document, int64 (1, length)."""
        return torch.randint(self.config.vocab_size, (1, length))

    @torch.no_grad()
    def live_percent(self, length: int) -> float | None:
        if not self.config.attention.has_statistics:
            return None
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            stats = attention_stats(self.module.model, self.sample(length).to(self.device))
        return 100 * float(torch.stack([layer.live_share.mean() for layer in stats]).mean())


def run(trial: Trial, row: Row, steps: int, warm_up: int, live: bool) -> Row:
    """Fills a row; out of memory is a result too. live: another forward pass for the share of live tiles."""
    try:
        for name, value in trial.measure(row.tokens, row.length, steps, warm_up).items():
            setattr(row, name, value)
        if live:
            row.live_percent = trial.live_percent(row.length)
    except torch.cuda.OutOfMemoryError:
        # much that is reserved beyond that: PYTORCH_ALLOC_CONF=expandable_segments:True may help
        peaks = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
        row.note = "out of memory at {:.1f} GiB, {:.1f} reserved".format(*(peak / 2**30 for peak in peaks))
        trial.optimizer.zero_grad()
    gc.collect()
    torch.cuda.empty_cache()
    return row


def show(row: Row) -> None:
    speed = f"{row.tokens_per_second:>10,.0f}" if row.tokens_per_second else f"{'-':>10}"
    mfu = f"{100 * row.mfu:6.1f}" if row.mfu else f"{'-':>6}"
    peak = f"{row.peak_gib:8.1f}" if row.peak_gib else f"{'-':>8}"
    live = f"{row.live_percent:6.1f}" if row.live_percent is not None else f"{'-':>6}"
    print(
        f"{row.model:6} {row.attention:9} {row.float8:18} {row.checkpointing:9} {row.length:>7} {row.tokens:>7} "
        f"{speed} {mfu} {peak} {live}  {row.note}",
        flush=True,
    )


def parse() -> argparse.Namespace:
    parser = PlainParser(prog="python -m benchmarks.train_speed", description=__doc__)
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    parser.add_argument("--models", nargs="+", choices=names, help="configs/models; 1b if nothing is named")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="softmax and asentmax if nothing is named")
    parser.add_argument(
        "--runs", nargs="+", default=[], metavar="RUN", help="checkpoints in place of --models, --kinds"
    )
    parser.add_argument("--data", type=a_path, help="prepared corpus of --runs, whose held-out documents are read")
    parser.add_argument("--lengths", nargs="*", type=a_count, default=[4096, 8192, 32768], help="tokens of a sequence")
    parser.add_argument("--tokens", type=a_count, default=32768, help="of a step, or one sequence if that is longer")
    parser.add_argument("--longest", nargs="*", type=a_count, default=[], metavar="LENGTH",
                        help="one step of each after another, with checkpointing, until memory ends")  # fmt: skip
    parser.add_argument("--sequence_parallel", type=a_count, default=1, metavar="S", help="GPUs that share a sequence")
    parser.add_argument("--loss", default="auto", help="model.loss_backend")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--checkpointing", nargs="+", choices=get_args(ActivationCheckpointing), default=["none"],
                        help="model.activation_checkpointing of --lengths")  # fmt: skip
    parser.add_argument("--float8", nargs="+", choices=get_args(Float8), default=["none"], help="model.float8")
    parser.add_argument("--flash_attention", choices=get_args(FlashAttention), default="auto",
                        help="model.flash_attention")  # fmt: skip
    parser.add_argument("--peers", nargs="+", choices=("litgpt",), default=[],
                        help="other recipes' steps at --lengths: LitGPT's of 1b's shape, softmax, in bf16")  # fmt: skip
    parser.add_argument("--tile", type=int, default=0, help="model.mlp_tile_tokens of --longest")
    parser.add_argument("--steps", type=a_count, default=5)
    parser.add_argument("--profile", type=a_count, default=0, metavar="N", help="a row's N slowest kernels behind it")
    parser.add_argument("--output", type=a_path, default=Path("runs/benchmarks/train_speed.csv"))
    options = parser.parse_args()
    if options.runs and (options.models or options.kinds):
        parser.error("--runs brings models of its own: leave out --models and --kinds, or run the two one by one")
    if options.data and not options.runs:
        parser.error(f"--data is {options.data}, but only --runs reads it: name runs, or leave it out")
    if options.runs and options.sequence_parallel > 1:
        parser.error(f"--sequence_parallel is {options.sequence_parallel}: expected 1 with --runs")
    options.models, options.kinds = options.models or ["1b"], options.kinds or ["softmax", "asentmax"]
    check_output_file(options.output)
    return options


def main() -> int:
    """Returns the exit code: 0, or 2 without a CUDA device."""
    options = parse()
    if not torch.cuda.is_available():
        print("error: python -m benchmarks.train_speed needs a CUDA device, and torch finds none", file=sys.stderr)
        return 2
    ranks = options.sequence_parallel
    models: list[tuple[str, str, Callable[[dict[str, Any]], Trial]]] = []
    step_tokens = {n: max(n, options.tokens // n * n) for n in options.lengths + options.longest}
    try:
        if options.peers:
            from benchmarks import litgpt_peer  # it builds on this module

            litgpt_peer.check_installed()
        for recipe in options.float8:
            check_installed(recipe)
            check_device(recipe, torch.device("cuda"))
        if options.runs:
            from benchmarks import trained_steps  # it builds on this module

            subjects, store = trained_steps.open_runs(options.runs, options.data)
            for length, tokens in step_tokens.items():
                trained_steps.windows(store, length, tokens // length)
            for subject in subjects:
                kind = subject.checkpoint.architecture.attention.kind
                models.append((subject.label, kind, partial(trained_steps.TrainedTrial, subject, store, options.loss)))
        else:
            for model, tokens in product(options.models, step_tokens.values()):
                first_rank(network(model, "softmax"), ranks, tokens)
            for model, kind in product(options.models, options.kinds):
                models.append((model, kind, partial(Trial, network(model, kind), options.loss, ranks)))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, loss {options.loss}"
        + f", one of {ranks} ranks" * (ranks > 1)
    )
    print("model  attention float8             mode       length  tokens   tokens/s    MFU peak GiB live %")
    rows: list[Row] = []

    def add(
        trial: Trial, model: str, kind: str, modes: tuple[str, str], length: int, steps: int, warm_up: int, live: bool
    ) -> Row:
        row = Row(model, kind, *modes, step_tokens[length], length, None, None, None, None, None)
        row = run(trial, row, steps, warm_up, live)
        rows.append(row)
        show(row)
        write_csv([asdict(row) for row in rows], options.output)  # each time: what fails later takes none with it
        if options.profile and row.tokens_per_second:
            try:
                trial.profile(row.tokens, length, options.profile)
            except torch.cuda.OutOfMemoryError:
                print("out of memory: no profile of this row", flush=True)
        return row

    for (model, kind, make), float8 in product(models, options.float8):
        shared: dict[str, Any] = dict(
            compile=not options.eager, float8=float8, flash_attention=options.flash_attention
        )  # fmt: skip
        for mode in options.checkpointing if options.lengths else ():
            torch._dynamo.reset()  # or compiled blocks of the mode before count towards the limit of recompilations
            trial = make({**shared, "activation_checkpointing": mode})
            for length in options.lengths:
                add(trial, model, kind, (float8, mode), length, options.steps, 2, live=True)
            del trial
            gc.collect()
            torch.cuda.empty_cache()
        if options.longest:
            checkpointed = dict(activation_checkpointing="full", mlp_tile_tokens=options.tile)
            trial = make({**shared, **checkpointed})
            trial.compile_for_any_length()
            for length in options.longest:
                if add(trial, model, kind, (float8, "full"), length, 1, 1, live=False).tokens_per_second is None:
                    break
            del trial
        gc.collect()
        torch.cuda.empty_cache()
    if options.peers and options.lengths:
        torch._dynamo.reset()
        flash_attention.deactivate()
        trial = litgpt_peer.LitGPTTrial(max(options.lengths))
        for length in options.lengths:
            add(trial, litgpt_peer.MODEL, "litgpt", ("none", "none"), length, options.steps, 2, live=False)
    return 0


if __name__ == "__main__":
    with user_errors():
        sys.exit(main())
