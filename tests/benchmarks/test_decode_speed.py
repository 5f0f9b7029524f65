"""The generation-speed benchmark, as far as it runs without a CUDA device."""

import pytest
import torch

from benchmarks.decode_speed import EVICTING, Row, build, main, measure, measure_evicting, show
from benchmarks.train_speed import KINDS, network


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_and_decoding_are_timed(kind: str) -> None:
    model = build(network("smoke", kind), torch.device("cpu"))
    assert model.embedding.weight.dtype == torch.bfloat16
    found = measure(model, rows=2, length=40, chunk_tokens=32, steps=2, cuda_graphs=False)
    assert found["decode_per_second"] == pytest.approx(2 / (found["step_ms"] / 1e3))
    assert all(0 < value < 1e9 for value in found.values()) and len(found) == 4


@pytest.mark.parametrize("name", EVICTING)
def test_eviction_is_timed_and_holds_less(name: str) -> None:
    model = build(network("smoke", "softmax"), torch.device("cpu"))
    whole = measure(model, 1, 1000, chunk_tokens=500, steps=1, cuda_graphs=False)
    found = measure_evicting(model, name, 0.1, 1000, chunk_tokens=500, steps=1)
    assert found.keys() == whole.keys() and found["cache_mib"] < 0.5 * whole["cache_mib"]


def test_rows_show_what_was_measured_and_what_did_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    show(Row("125m", "entmax", "nape", 4096, 1, 123456.0, 98.76, 10.125, 1.24, 144.0, 0.876))
    shown = "125m entmax nape 4096 1 123,456 98.8 10.12 1.2 144.0 0.88"
    assert capsys.readouterr().out.split() == shown.split()
    show(Row("125m", "softmax", "rope", 131072, 4, note="out of memory"))
    assert capsys.readouterr().out.split() == [
        "125m",
        "softmax",
        "rope",
        "131072",
        "4",
        *"------",
        "out",
        "of",
        "memory",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it needs where there is no CUDA device")
def test_needs_cuda(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["decode_speed"])
    assert main() == 2 and "needs a CUDA device" in capsys.readouterr().err
