"""The suite "biased": its biases, checks and rows, on the CPU; its timing needs a CUDA device."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import block_bias, selected_blocks
from benchmarks.block_bias import biased, biases, check, flex, ours
from benchmarks.measure import CheckFailed, Repeats, Timing
from benchmarks.report import Report
from benchmarks.suites import SUITES, Bench
from benchmarks.workloads import gaussian
from model import visible_attention
from model.config import HierarchicalConfig
from model.hierarchical.blocks import Blocks, packed_blocks


def inputs(live: float = 0.3, n_tokens: int = 600, length: int = 300) -> tuple[tuple[Tensor, ...], Blocks]:
    q, k, v = gaussian(n_tokens, 4, 16, spread=1.0, device="cpu", dtype=torch.float32)
    bounds = torch.arange(0, n_tokens + 1, length, dtype=torch.int32)
    blocks = packed_blocks(HierarchicalConfig(64), n_tokens, bounds, length, torch.device("cpu"))
    bias = biases(blocks, 4, live, seed=0, device="cpu")
    return tuple(x.requires_grad_() for x in (q, k[:, :2].contiguous(), v[:, :2].contiguous(), bias)), blocks


def test_biases() -> None:
    (_, _, _, bias), blocks = inputs()
    live = bias > -torch.inf
    own = blocks.own_block[0]
    assert bool(live[0, :, torch.arange(600), own].all()) and not bool(
        (live & ~blocks.visible(torch.arange(600))).any()
    )
    before = blocks.visible(torch.arange(600))[0] & (torch.arange(5) != own[:, None])
    assert 0.2 < float((live[0] & before).sum() / (4 * before.sum())) < 0.4


def test_wrong_results_are_found() -> None:
    those, blocks = inputs()
    bias = those[3]
    check(*those, blocks, lambda: ours(*those, blocks))
    with pytest.raises(CheckFailed, match="wrong: out off by"):
        check(*those, blocks, lambda: ours(*those, blocks) * 1.1)
    with pytest.raises(CheckFailed, match=r"^wrong: dbias off by [^,]*$"):
        check(*those, blocks, lambda: ours(*those, blocks) + (bias - bias.detach()).nan_to_num().sum() * 1e-1)


def test_flex_has_the_same_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visible_attention, "compiled_flex", lambda: torch.nn.attention.flex_attention.flex_attention)
    those, blocks = inputs()
    those = tuple(x.detach() for x in those)
    with torch.no_grad():
        torch.testing.assert_close(flex(*those, blocks)(), ours(*those, blocks))


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that fails leaves the others."""
    monkeypatch.setattr(block_bias, "SHAPES", ((512, 512, 16, 4, 2),))
    monkeypatch.setattr(block_bias, "FLEX_LENGTHS", (512,))
    monkeypatch.setattr(block_bias, "LIVE", (1.0, 0.5))
    times = iter([1.0, 2.0, 3.0, 4.0, 5.0, 8.0, 1.0, 2.0])
    monkeypatch.setattr(selected_blocks, "measure_time", lambda *_: Timing(next(times), 0, 0))
    monkeypatch.setattr(selected_blocks, "measure_extra_bytes", lambda call: call() or 2**20)

    def broken(*_: Any) -> Any:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(block_bias, "flex", broken)
    bench = Bench(Report(tmp_path, []), Repeats.quick(), ("flash",), torch.float32, 0)
    monkeypatch.setattr(bench, "fresh", lambda: dict(seed=1, dtype=torch.float32, device="cpu"))
    biased(bench)
    rows = {(row["live"], row["implementation"]): row for row in bench.report.rows["biased"]}
    assert list(rows) == [(None, "scores"), (1.0, "ours"), (1.0, "FlexAttention"), (1.0, "FA2, dense"), (0.5, "ours")]
    assert [row["note"] for row in rows.values()] == ["", "", "no kernel", "", ""]
    assert rows[1.0, "ours"]["ms"] == 4 and rows[1.0, "FA2, dense"]["ours / it"] == 0.5
    assert (tmp_path / "biased.csv").is_file() and SUITES["biased"] is biased
