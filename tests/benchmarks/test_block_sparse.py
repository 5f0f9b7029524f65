"""The suite "bsfa": its thresholds, checks and rows, on the CPU; its timing needs a CUDA device."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import block_sparse
from benchmarks.block_sparse import DENSITIES, bsfa, check, kept_share, thresholds_for
from benchmarks.measure import CheckFailed, Repeats, Timing
from benchmarks.peers import PEERS, Implementation, Unsupported
from benchmarks.report import Report
from benchmarks.suites import SUITES, Bench
from benchmarks.workloads import Workload, gaussian
from kernels import block_sparse_softmax_attention

CPU: dict[str, Any] = dict(device="cpu", dtype=torch.float32)


def test_thresholds_keep_the_wanted_share() -> None:
    q, k, v = gaussian(2048, 2, 16, spread=1.0, **CPU)
    for wanted, thresholds in zip(DENSITIES, thresholds_for(q, k, DENSITIES), strict=True):
        result = block_sparse_softmax_attention(q, k, v, thresholds=thresholds, return_stats=True)
        assert isinstance(result, tuple)
        assert float(result[1].density.mean()) == pytest.approx(kept_share(wanted, 2048))
        check(q, k, v, thresholds, result[0])
        with pytest.raises(CheckFailed, match="T 2048, head dim 16: off by"):
            check(q, k, v, thresholds, result[0] * 1.1)


def test_shares_of_long_texts_are_the_wanted_ones() -> None:
    assert [kept_share(density, 32768) for density in DENSITIES] == pytest.approx(DENSITIES, abs=2e-3)


def test_rows_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor, thresholds: Tensor | None) -> Tensor:
        out = block_sparse_softmax_attention(q, k, v, thresholds=thresholds)
        assert isinstance(out, Tensor)
        return out

    def attention(*tensors: Tensor, backend: str, **options: Any) -> Any:
        return block_sparse_softmax_attention(*tensors, **options)

    times = iter([2.0, 4.0, 2.5, 3.0, 3.5])
    monkeypatch.setattr(block_sparse, "SHAPES", ((2048, 16, 2),))
    monkeypatch.setattr(block_sparse, "forward", forward)
    monkeypatch.setattr(block_sparse, "block_sparse_softmax_attention", attention)
    monkeypatch.setattr(block_sparse, "measure_time", lambda *_: Timing(next(times), 0, 0))
    monkeypatch.setattr(block_sparse, "gaussian", lambda *shape, spread, **_: gaussian(*shape, spread=spread, **CPU))

    def unsupported(_: Workload) -> None:
        raise Unsupported("not on this device")

    monkeypatch.setitem(PEERS, "cudnn", Implementation("cuDNN", "softmax", unsupported))
    bench = Bench(Report(tmp_path, []), Repeats.quick(), ("varlen", "cudnn", "flash"), torch.float32, 0)
    monkeypatch.setattr(block_sparse, "DENSITIES", (0.5, 0.75))
    bsfa(bench)
    rows = {(row["implementation"], round(row["density %"], -1)): row for row in bench.report.rows["bsfa"]}
    assert [name for name, _ in rows] == ["FA2", "cuDNN", "ungated", "BSFA", "BSFA"]
    assert rows["cuDNN", 100]["ms"] is None and rows["cuDNN", 100]["note"] == "not on this device"
    assert rows["ungated", 100]["FA2 / ms"] == 0.5
    assert rows["BSFA", 50]["ungated / ms"] == 4 / 2.5
    assert (tmp_path / "bsfa.csv").is_file() and (tmp_path / "bsfa.png").is_file()
    assert SUITES["bsfa"] is bsfa
