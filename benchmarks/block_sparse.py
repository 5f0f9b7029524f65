"""The suite "bsfa": the block-sparse softmax kernel over density, against itself without gating and dense peers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.measure import TOLERANCE, CheckFailed, measure_time, relative_error
from benchmarks.peers import PEERS, Unsupported
from benchmarks.report import Row
from benchmarks.workloads import Workload, gaussian
from kernels import QUERY_BLOCK, block_maxima, block_sparse_softmax_attention
from kernels.block_sparse.reference import query_blocks

if TYPE_CHECKING:
    from benchmarks.suites import Bench

DENSITIES = (0.25, 0.5, 0.75)
RIVALS = ("flash", "cudnn")  # of all peers
SHAPES = ((32768, 64, 16), (32768, 128, 8), (131072, 64, 16), (131072, 128, 8))  # tokens, head dim, heads
COLUMNS = {"T": 6, "D": 3, "H": 2, "implementation": 14, "density %": 9, "ms": 7, "ungated / ms": 12, "FA2 / ms": 8,
           "note": 1}  # fmt: skip


def thresholds_for(q: Tensor, k: Tensor, densities: Sequence[float]) -> Tensor:
    """float32 (densities, H, query blocks) that keep these shares of every row of blocks, diagonal ones included, which
    are never fewer: midway between the largest scores of two blocks. Causal; batch 1."""
    heads, n_blocks = q.shape[1], -(-k.shape[2] // QUERY_BLOCK)
    thresholds = torch.full((len(densities), heads, n_blocks), -torch.inf, device=q.device)
    for block, maxima in block_maxima(q, k):
        n_free = block.diagonal.start
        if not n_free:
            continue
        best = maxima[0, :, :n_free].sort(-1, descending=True).values  # [H, off-diagonal blocks]
        for i, density in enumerate(densities):
            keep = round(density * block.seen) - (block.seen - n_free)
            if keep <= 0:
                thresholds[i, :, block.index] = torch.inf
            elif keep < n_free:
                thresholds[i, :, block.index] = best[:, keep - 1 : keep + 1].mean(-1)
    return thresholds


def kept_share(density: float, n_tokens: int) -> float:
    """Density that `thresholds_for` gives."""
    blocks = query_blocks(n_tokens, n_tokens, True)
    kept = sum(max(round(density * block.seen), block.seen - block.diagonal.start) for block in blocks)
    return kept / sum(block.seen for block in blocks)


def check(q: Tensor, k: Tensor, v: Tensor, thresholds: Tensor | None, out: Tensor) -> None:
    """Raises CheckFailed unless the last block of queries has what the definition gives in float64."""
    last = slice(k.shape[2] // QUERY_BLOCK * QUERY_BLOCK - QUERY_BLOCK, k.shape[2])
    exact = (q[:, :, last].double(), k.double(), v.double())
    truth = block_sparse_softmax_attention(*exact, thresholds=thresholds, backend="torch")
    assert isinstance(truth, Tensor)
    error = relative_error(out[:, :, last], truth)
    if not error <= TOLERANCE[q.dtype]["out"]:
        raise CheckFailed(f"T {k.shape[2]}, head dim {k.shape[3]}: off by {error:.1e} ({TOLERANCE[q.dtype]['out']})")


def forward(q: Tensor, k: Tensor, v: Tensor, thresholds: Tensor | None) -> Tensor:
    out = block_sparse_softmax_attention(q, k, v, thresholds=thresholds, backend="triton")
    assert isinstance(out, Tensor)
    return out


@torch.no_grad()
def bsfa(bench: Bench) -> None:
    """The suite."""
    bench.report.start("bsfa", "block-sparse softmax forward over density, Gaussian inputs", COLUMNS)
    for n_tokens, head_dim, heads in SHAPES:
        q, k, v = gaussian(n_tokens, heads, head_dim, spread=1.0, **bench.fresh())
        _one_shape(bench, q, k, v)
    try:
        path = plot(bench.report.rows["bsfa"], bench.report.folder / "bsfa.png")
    except ImportError as error:
        bench.report.line(f"no plot: {error}")
        return
    bench.report.line(f"plot: {path}")


def _one_shape(bench: Bench, q: Tensor, k: Tensor, v: Tensor) -> None:
    _, heads, n_tokens, head_dim = q.shape
    times: dict[str, float] = {}

    def add(name: str, density: float, ms: float | None, note: str = "") -> None:
        compared = {
            f"{column} / ms": times[peer] / ms if ms and peer in times else None
            for column, peer in (("ungated", "ungated"), ("FA2", "FA2"))
        }
        row: dict[str, Any] = {"T": n_tokens, "D": head_dim, "H": heads, "dtype": str(q.dtype).removeprefix("torch."),
                               "implementation": name, "density %": 100 * density, "ms": ms} | compared  # fmt: skip
        bench.report.add(row | {"note": note})

    for key in [one for one in RIVALS if one in bench.peers]:
        name = PEERS[key].name
        try:
            run = PEERS[key].prepare(Workload("", q, k, v))
            times[name] = measure_time(run, bench.repeats).median
        except (Unsupported, RuntimeError) as error:
            add(name, 1.0, None, str(error).splitlines()[0][:100])
            continue
        add(name, 1.0, times[name])
    check(q, k, v, None, forward(q, k, v, None))
    times["ungated"] = measure_time(lambda: forward(q, k, v, None), bench.repeats).median
    add("ungated", 1.0, times["ungated"], "bar: FA2 / ms at least 0.83")
    for wanted, thresholds in zip(DENSITIES, thresholds_for(q, k, DENSITIES), strict=True):
        result = block_sparse_softmax_attention(q, k, v, thresholds=thresholds, backend="triton", return_stats=True)
        assert isinstance(result, tuple)
        out, stats = result
        check(q, k, v, thresholds, out)
        density = float(stats.density.mean())
        expected = kept_share(wanted, n_tokens)
        if abs(density - expected) > 1e-3:
            raise CheckFailed(f"T {n_tokens}, head dim {head_dim}: density {density:.4f}, expected {expected:.4f}")
        ms = measure_time(lambda x=thresholds: forward(q, k, v, x), bench.repeats).median  # type: ignore[misc]
        add("BSFA", density, ms, "bar: ungated / ms at least 1.35" if wanted == 0.25 else "")


def plot(rows: Sequence[Row], path: Path) -> Path:
    """Speed-up over the ungated kernel and over FA2 against density, a line for each shape."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from eval.reporting.figures import COLOURS, MARKERS, STYLE

    shapes = list(dict.fromkeys((row["T"], row["D"]) for row in rows))
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 4.4))
        for axes, column, over in zip(
            figure.subplots(1, 2, sharey=True),
            ("ungated / ms", "FA2 / ms"),
            ("itself without gating", "FA2"),
            strict=True,
        ):
            for index, shape in enumerate(shapes):
                points = sorted(
                    (row["density %"], row[column])
                    for row in rows
                    if (row["T"], row["D"]) == shape and row["implementation"] in ("BSFA", "ungated") and row[column]
                )
                style: dict[str, Any] = dict(color=COLOURS[index % len(COLOURS)], marker=MARKERS[index % len(MARKERS)])
                if points:
                    axes.plot(*zip(*points, strict=True), label=f"{shape[0]:,} tokens, head dim {shape[1]}", **style)
            axes.axhline(1, color="#444444", linestyle=":", linewidth=1.4)
            axes.set(title=f"over {over}", xlabel="density (% of causal blocks kept)")
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False)
        figure.axes[0].set_ylim(bottom=0)  # of both; it ends autoscaling, so after all is drawn
        figure.supylabel("speed-up of the forward pass")
        figure.savefig(path)
    return path
