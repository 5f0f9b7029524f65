"""The suite "selected": its selections, checks and rows, on the CPU; its timing needs a CUDA device."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import selected_blocks
from benchmarks.measure import CheckFailed, Repeats, Timing
from benchmarks.report import Report
from benchmarks.selected_blocks import check, flex, ours, select, selected
from benchmarks.suites import SUITES, Bench
from benchmarks.workloads import gaussian
from model import visible_attention


def inputs(kind: str = "scattered", n_tokens: int = 600) -> tuple[torch.Tensor, ...]:
    q, k, v = gaussian(n_tokens, 4, 16, spread=1.0, device="cpu", dtype=torch.float32)
    q, k, v = (x.requires_grad_() for x in (q, k[:, :2].contiguous(), v[:, :2].contiguous()))
    return q, k, v, select(n_tokens, 2, kind, seed=0, device="cpu"), torch.arange(n_tokens)[None]


@pytest.mark.parametrize("kind", ["alike", "scattered"])
def test_selections(kind: str) -> None:
    first = select(1500, 2, kind, seed=0, device="cpu")[0]
    for query in (0, 63, 64, 200, 1023, 1499):
        for group in range(2):
            those = [x // 64 for x in first[group, query].tolist() if x >= 0]
            own = query // 64
            assert len(those) == len(set(those)) == min(own + 1, 16) and max(those) == own
            assert {0, own, max(own - 1, 0)} <= set(those)
    different = len({tuple(sorted(row)) for row in first[0, 1408:1472].tolist()})
    assert different > 60 if kind == "scattered" else different < 60
    last = select(1500, 2, kind, seed=0, device="cpu", queries=1)
    assert last.shape == (1, 2, 1, 16) and int(last.max()) == 1472


def test_wrong_results_are_found() -> None:
    those = inputs()
    k = those[1]
    check(*those, lambda: ours(*those, few=0))
    with pytest.raises(CheckFailed, match="wrong: out off by"):
        check(*those, lambda: ours(*those, few=0) * 1.1)
    with pytest.raises(CheckFailed, match=r"^wrong: dk off by [^,]*$"):
        check(*those, lambda: ours(*those, few=0) + (k - k.detach()).sum() * 1e-2)


def test_flex_has_the_same_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visible_attention, "compiled_flex", lambda: torch.nn.attention.flex_attention.flex_attention)
    those = tuple(x.detach() for x in inputs("alike", 1500))
    with torch.no_grad():
        torch.testing.assert_close(flex(*those)(), ours(*those, few=0))


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that fails leaves the others."""
    monkeypatch.setattr(selected_blocks, "SHAPES", ((512, 16, 4, 2),))
    monkeypatch.setattr(selected_blocks, "FLEX_LENGTHS", (512,))
    monkeypatch.setattr(selected_blocks, "DECODING", (300,))
    times = iter([1.0, 2.0, 4.0, 8.0, 3.0, 0.5, 2.0])
    monkeypatch.setattr(selected_blocks, "measure_time", lambda *_: Timing(next(times), 0, 0))
    monkeypatch.setattr(selected_blocks, "measure_extra_bytes", lambda call: call() or 2**20)
    monkeypatch.setattr(selected_blocks, "SELECTIONS", ("alike",))

    def broken(*_: Any) -> Any:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(selected_blocks, "flex", broken)
    bench = Bench(Report(tmp_path, []), Repeats.quick(), ("flash",), torch.float32, 0)
    monkeypatch.setattr(bench, "fresh", lambda: dict(seed=1, dtype=torch.float32, device="cpu"))
    selected(bench)
    rows = {(row["selection"], row["implementation"]): row for row in bench.report.rows["selected"]}
    assert [name for _, name in rows] == ["ours", "ours by query", "FlexAttention", "FA2, dense", "ours", "SDPA, dense"]
    assert rows["alike", "ours"]["ms"] == 2 and rows["alike", "ours"]["forward ms"] == 1
    assert rows["alike", "ours by query"]["ours / it"] == 1 / 4
    assert rows["alike", "FlexAttention"]["note"] == "no kernel" and rows["alike", "FlexAttention"]["ms"] is None
    assert rows["decoding", "SDPA, dense"]["ours / it"] == 0.25
    assert (tmp_path / "selected.csv").is_file() and SUITES["selected"] is selected
