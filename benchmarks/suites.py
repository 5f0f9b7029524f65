"""The suites of the kernel benchmark: which workloads, against whom, and what is concluded from them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import errors
from benchmarks.block_bias import biased
from benchmarks.block_sparse import bsfa
from benchmarks.measure import CheckFailed, Measurement, Repeats, Timing, measure, run_once, statistics_of
from benchmarks.peers import OURS, OURS_WITHOUT_SKIP, PEERS
from benchmarks.report import Report, crossing, interpolated, plot_speed_up
from benchmarks.selected_blocks import selected
from benchmarks.trained import mean_shares, position_free, summed
from benchmarks.workloads import (
    SHIFT,
    Workload,
    document_lengths,
    gaussian,
    linear_slopes,
    load_layers,
    load_qkv,
    packed,
    sink_and_window,
    topics,
)

QKV_SUITES = ("checkpoint", "trained")  # need files of benchmarks.dump_qkv
COLUMNS = {
    "workload": 30, "T": 6, "D": 3, "H": 2, "live %": 6, "passes": 6, "implementation": 14, "ms": 7, "/ ours": 6,
    "forward ms": 10, "MiB": 6, "note": 1,
}  # fmt: skip
DENSE_PEERS = ("FA2", "cuDNN")


@dataclass
class Bench:
    """Settings of a run and what its suites share. peers: keys of PEERS. qkv: files for the suites of QKV_SUITES."""

    report: Report
    repeats: Repeats
    peers: Sequence[str]
    dtype: torch.dtype
    seed: int
    qkv: Sequence[Path] = ()
    drawn: int = 0

    def fresh(self) -> dict[str, Any]:
        """Arguments of a generator of workloads.py; every call has its own seed."""
        self.drawn += 1
        return dict(seed=1000 * self.seed + self.drawn, dtype=self.dtype, device="cuda")

    def topics(self, n_tokens: int, head_dim: int, heads: int, n_topics: int, **options: Any) -> Workload:
        shift = options.pop("shift", 0)
        q, k, v = topics(n_tokens, heads, head_dim, n_topics, shift=shift, **self.fresh())
        options.setdefault("name", f"{n_topics} topic{'s' * (n_topics > 1)}")
        return Workload(q=q, k=k, v=v, **options)

    def compare(
        self, workload: Workload, *, peers: Sequence[str] | None = None, timed: bool = True, checked: bool = True
    ) -> dict[str, dict[str, Any]]:
        """Ours, then the peers, a row each. Returns the rows by implementation."""
        stats = statistics_of(workload)
        shared = dict(
            live_share=float(stats.live_share.mean()),
            passes=None if stats.passes is None else float(stats.passes.mean()),
        )
        del stats
        rows: dict[str, dict[str, Any]] = {}
        for implementation in (OURS, *(PEERS[name] for name in (self.peers if peers is None else peers))):
            measurement = measure(workload, implementation, self.repeats, timed=timed, checked=checked)
            ours = rows.get("ours", {}).get("ms")
            rows[implementation.name] = self.add(workload, implementation.name, measurement, ours=ours, **shared)
        return rows

    def add(
        self, workload: Workload, name: str, found: Measurement, *,
        live_share: float | None = None, passes: float | None = None, ours: float | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Writes a row; `ours`: milliseconds to compare with."""
        _, heads, n_tokens, head_dim = workload.q.shape
        alpha = workload.alpha
        both, forward = found.both, found.forward
        row: dict[str, Any] = {
            "workload": workload.name, "T": n_tokens, "D": head_dim, "H": heads, "key/value heads": workload.k.shape[1],
            "dtype": str(workload.q.dtype).removeprefix("torch."),
            "alpha": " ".join(f"{a:.3g}" for a in alpha.tolist()) if isinstance(alpha, Tensor) else alpha,
            "live %": None if live_share is None else 100 * live_share, "passes": passes, "implementation": name,
            "ms": None if both is None else both.median,
            "/ ours": 1.0 if name == "ours" and both else both.median / ours if both and ours else None,
            "ms decile 1": None if both is None else both.low, "ms decile 9": None if both is None else both.high,
            "forward ms": None if forward is None else forward.median,
            "MiB": None if found.extra_bytes is None else found.extra_bytes / 2**20,
            "note": "; ".join(filter(None, (found.note, workload.target if name == "ours" else ""))),
        }  # fmt: skip
        self.report.add(row)
        return row

    def start(self, suite: str, title: str) -> None:
        self.report.start(suite, title, COLUMNS)


def table(bench: Bench) -> None:
    bench.start("table", "the six bars")
    for n_tokens, head_dim, heads, n_topics, target in (
        (32768, 64, 16, 8, "bar 6.5 ms: AdaSplash-2 / 2.9, cuDNN / 2.9, FA2 / 4"),
        (32768, 64, 16, 4, "bar 9 ms: AdaSplash-2 / 2.4, cuDNN / 2"),
        (32768, 128, 8, 4, "bar 7.5 ms: cuDNN / 1.9"),
        (8192, 64, 16, 4, "bar 0.9 ms: AdaSplash-2 / 1.9, cuDNN / 1.4"),
        (8192, 64, 16, 1, "bar 2 ms: AdaSplash-2 / 1.4, FA2 / 1"),
        (131072, 64, 8, 8, "bar: a third of the faster of AdaSplash-2 and cuDNN"),
    ):
        bench.compare(bench.topics(n_tokens, head_dim, heads, n_topics, target=target))


def density(bench: Bench) -> None:
    bench.start("density", "time over live tiles at T = 32768")
    rows = [bench.compare(bench.topics(32768, 64, 16, n_topics)) for n_topics in (16, 12, 8, 6, 4, 3, 2, 1)]
    for name in DENSE_PEERS:
        both = [row for row in rows if row.get(name, {}).get("ms") is not None]
        shares = [row["ours"]["live %"] for row in both]
        found = crossing(shares, [row["ours"]["ms"] for row in both], [row[name]["ms"] for row in both])
        if not both:
            text = f"{name} was not timed"
        elif found is None:
            text = f"ours is not faster than {name} even at {min(shares):.0f} % live"
        elif found > 100:
            text = f"ours is faster than {name} at every density measured, up to {max(shares):.0f} % live"
        else:
            text = f"ours is faster than {name} up to {found:.0f} % live (interpolated)"
        bench.report.line(text)
    _plot(bench, "live %", "speedup_over_density.png", "Speed-up over live tiles, T = 32,768")


def length(bench: Bench) -> None:
    bench.start("length", "time over length, 8 topics")
    for n_tokens in (4096, 8192, 16384, 32768, 65536, 131072):
        bench.compare(bench.topics(n_tokens, 64, 16, 8))
    _plot(bench, "T", "speedup_over_length.png", "Speed-up over length, 8 topics")


def head_dim(bench: Bench) -> None:
    bench.start("head_dim", "time over head dim at one width, 8 topics")
    for dim in (32, 64, 96, 128, 256):
        bench.compare(bench.topics(16384, dim, 1024 // dim, 8, name=f"8 topics, head dim {dim}"))


def _plot(bench: Bench, x: str, name: str, title: str) -> None:
    rows = bench.report.rows[bench.report.suite]
    if not any(row["/ ours"] is not None and row["implementation"] != "ours" for row in rows):
        bench.report.line("no plot: no peer was timed")
        return
    try:
        path = plot_speed_up(rows, x, bench.report.folder / name, title)
    except ImportError as error:
        bench.report.line(f"no plot: {error}")
        return
    bench.report.line(f"plot: {path}")


def alpha(bench: Bench) -> None:
    """Alpha as a number against tensors of alpha, at the same inputs and, by interpolation, at the same live share."""
    bench.start("alpha", "alpha 1.5 as a number, as a learned tensor, and mixed 1.1 ... 2; ours only")
    heads = 16
    plain: list[dict[str, Any]] = []
    mixed: list[tuple[str, dict[str, Any], float]] = []
    for n_topics in (16, 8, 4, 2, 1):
        base = bench.topics(32768, 64, heads, n_topics)
        same = base.name

        def one(name: str, value: float | Tensor, base: Workload = base) -> dict[str, Any]:
            row = replace(base, name=f"{base.name}, {name}", alpha=value)
            return bench.compare(row, peers=())["ours"]

        number = one("alpha 1.5", 1.5)
        plain.append(number)
        if n_topics not in (8, 4):
            continue
        fixed = torch.full((heads,), 1.5, device="cuda")
        several = torch.linspace(1.1, 2, heads, device="cuda")
        one("sparsemax (number)", 2.0)
        for name, value in (
            ("tensor 1.5", fixed),
            ("tensor 1.5, learned", fixed.clone().requires_grad_()),
            ("mixed", several),
            ("mixed, learned", several.clone().requires_grad_()),
        ):
            row = one(name, value)
            mixed.append((f"{same}, {name}", row, number["ms"]))
    shares, times = [row["live %"] for row in plain], [row["ms"] for row in plain]
    for name, row, same_inputs in mixed:
        expected = interpolated(shares, times, row["live %"])
        at_share = f"{row['ms'] / expected:.2f} x at the same live tiles" if expected else "live share out of range"
        bench.report.line(f"{name}: {row['ms'] / same_inputs:.2f} x alpha = 1.5 at the same inputs, {at_share}")


def alibi(bench: Bench) -> None:
    bench.start("alibi", "heads with slopes 1, 1/2, ... 1/8, Gaussian inputs, with and without the analytic skip")
    heads = 8
    ours: dict[int, float] = {}
    for n_tokens in (16384, 32768, 65536, 131072):
        q, k, v = gaussian(n_tokens, heads, 64, spread=1.0, **bench.fresh())
        workload = Workload("slopes 1 ... 1/8", q, k, v, alibi_slopes=linear_slopes(heads))
        rows = bench.compare(workload)
        ours[n_tokens] = rows["ours"]["ms"]
        found = measure(workload, OURS_WITHOUT_SKIP, bench.repeats)
        without = bench.add(workload, OURS_WITHOUT_SKIP.name, found, ours=ours[n_tokens])
        cotangent = torch.randn_like(workload.q)
        runs = [run_once(workload, "entmax", one.prepare(workload), cotangent) for one in (OURS, OURS_WITHOUT_SKIP)]
        differ = [name for name in runs[0] if not torch.equal(runs[0][name], runs[1][name])]
        if differ:
            raise CheckFailed(f"{workload.name}, T {n_tokens}: {', '.join(differ)} differ with and without the skip")
        bench.report.line(f"T {n_tokens}: results identical, {without['/ ours']:.1f} x faster with the skip (bar 5)")
    bench.report.line(f"16384 to 131072 tokens: {ours[131072] / ours[16384]:.1f} x the time (bar 9)")


def documents(bench: Bench) -> None:
    n_tokens = 65536
    lengths = document_lengths(n_tokens, seed=bench.seed)
    bench.start("documents", f"{n_tokens} tokens in {len(lengths)} documents: {' '.join(map(str, lengths))}")
    workload = packed(bench.topics(n_tokens, 64, 16, 8, name="packed, 8 topics"), lengths)
    rows = bench.compare(workload)
    alone = [measure(document, OURS, bench.repeats, checked=False) for document in workload.documents()]
    times = [one.both for one in alone if one.both is not None]
    total = Timing(sum(t.median for t in times), sum(t.low for t in times), sum(t.high for t in times))
    bench.add(workload, "ours, one by one", Measurement(total, note="sum over documents"), ours=rows["ours"]["ms"])
    whole = bench.compare(replace(workload, name="not packed", cu_seqlens=None), peers=())["ours"]["ms"]
    squares = sum(n * n for n in lengths) / n_tokens**2
    bench.report.line(
        f"packed: {rows['ours']['ms'] / total.median:.2f} x the sum of the documents' own times (bar 1.3), "
        f"{rows['ours']['ms'] / whole:.2f} x one document of all tokens (sum of squares: {squares:.2f} x)"
    )


def memory(bench: Bench) -> None:
    bench.start("memory", "peak extra memory of forward + backward, outputs and gradients included")
    for n_tokens in (8192, 32768, 131072):
        rows = bench.compare(bench.topics(n_tokens, 64, 16, 8), peers=("flash",), timed=False)
        ours, flash = rows["ours"]["MiB"], rows["FA2"]["MiB"]
        ratio = "FA2 was not measured" if flash is None else f"{ours / flash:.3f} x FA2's (bar 1)"
        bench.report.line(f"T {n_tokens}: {ours:.1f} MiB, {ratio}")


def rounding(bench: Bench) -> None:
    """The suite "errors"."""
    widths = {"case": 25, "dtype": 8, "alpha": 12}
    for name in errors.NAMES:
        widths |= {name: 7, f"{name} ratio": len(name) + 6}
    widths |= {"tau error": 9, "tau bar": 7, "max |z|": 7, "over the bar": 1}
    title = "relative norm errors against float64, ratio: over plain PyTorch's in the same dtype (bars 2, gradients 3)"
    bench.report.start("errors", title, widths)
    rows = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for case in errors.CASES:
            for value in errors.ALPHAS:
                for number in (False, True) if value in (1.5, 2.0) else (False,):
                    bench.drawn += 1
                    seed = 1000 * bench.seed + bench.drawn
                    rows.append(errors.error_row(case, value, dtype, seed=seed, float_alpha=number))
                    bench.report.add(rows[-1])
    over = sum(bool(row["over the bar"]) for row in rows)
    bench.report.line(f"{len(rows) - over} of {len(rows)} rows are within every bar")
    for name in errors.NAMES:
        worst = max((row for row in rows if f"{name} ratio" in row), key=lambda row: row[f"{name} ratio"])
        bench.report.line(
            f"largest ratio of {name}: {worst[f'{name} ratio']:.2f} ({worst['case']}, {worst['dtype']}, "
            f"alpha {worst['alpha']})"
        )


def patterns(bench: Bench) -> None:
    bench.start("patterns", "where the support lies, T = 32768")
    shape = (32768, 16, 64)
    bench.compare(bench.topics(32768, 64, 16, 8, name="8 topics"))
    bench.compare(bench.topics(32768, 64, 16, 8, name=f"8 topics, {SHIFT} tokens off grid", shift=SHIFT))
    bench.compare(bench.topics(32768, 64, 16, 4, name=f"4 topics, {SHIFT} tokens off grid", shift=SHIFT))
    bench.compare(Workload("sink, window, far blocks", *sink_and_window(*shape, **bench.fresh())))
    bench.compare(Workload("unstructured Gaussian", *gaussian(*shape, **bench.fresh())))


def checkpoint(bench: Bench) -> None:
    bench.start("checkpoint", "q, k, v, alpha and slopes of trained models")
    for path in bench.qkv:
        learned = load_qkv(path, "cuda", bench.dtype)
        bench.compare(learned)
        bench.compare(replace(learned, name=f"{learned.name}, alpha 1.5", alpha=1.5))


def trained(bench: Bench) -> None:
    bench.start("trained", "all layers of trained models: sums over layers, on their own q, k, v")
    for path in bench.qkv:
        layers = load_layers(path, "cuda", bench.dtype)
        free = [part for layer in layers if (part := position_free(layer)) is not None]
        for name, part in (("position-free heads", free), ("all heads", layers)):
            if not part:
                bench.report.line(f"{path}: no {name}")
                continue
            bench.report.line(f"{path}, {name}, {mean_shares(part)}")
            ours = None
            for implementation in (OURS, *(PEERS[peer] for peer in bench.peers)):
                found = summed([measure(layer, implementation, bench.repeats) for layer in part])
                shown = replace(part[0], name=f"{path.stem}, {name}")
                row = bench.add(shown, implementation.name, found, ours=ours)
                ours = ours or row["ms"]


def full(bench: Bench) -> None:
    bench.start("full", "every tile live: Gaussian scores, T = 32768")
    q, k, v = gaussian(32768, 16, 64, **bench.fresh())
    heads = torch.ones(16, device="cuda")
    for name, value in (("the number 1.5", 1.5), ("learned 1.5", 1.5 * heads), ("learned 1.15", 1.15 * heads)):
        given = value.requires_grad_() if isinstance(value, Tensor) else value
        bench.compare(Workload(name, q.detach(), k.detach(), v.detach(), alpha=given))


SUITES: dict[str, Callable[[Bench], None]] = {
    "table": table, "density": density, "length": length, "head_dim": head_dim, "alpha": alpha, "alibi": alibi,
    "documents": documents, "memory": memory, "errors": rounding, "patterns": patterns, "checkpoint": checkpoint,
    "trained": trained, "full": full, "bsfa": bsfa, "selected": selected, "biased": biased,
}  # fmt: skip
