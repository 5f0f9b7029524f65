import json
from pathlib import Path

import pytest

import eval.run
from tests.eval.conftest import MakeRun, failing_line

QUICK = ["--headline_tokens", "600", "--max_documents", "2", "--needle_samples", "1", "--needle_depths", "2"]
QUICK += ["--lengths", "1", "2", "--device", "cpu"]


def test_each_rotary_softmax_run_is_measured_with_dual_chunk_attention_too(
    corpus: Path, make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        str(make_run(tmp_path / name, kind, positions="rope"))
        for name, kind in (("ours", "asentmax"), ("rope", "softmax"))
    ]
    output = tmp_path / "report"
    given = [*runs, "--data", str(corpus), "--output", str(output), *QUICK]
    assert eval.run.main([*given, "--dual_chunk", "128"]) == 0
    report = json.loads((output / "report.json").read_text())
    assert [run["label"] for run in report["runs"]] == ["ours", "rope", "rope-dual-chunk"]
    assert [pair["baseline"] for pair in report["pairs"]] == ["rope", "rope"] and report["seeds"] == []
    said = "attention is Dual Chunk Attention, with no distance above 96 tokens and true ones up to 16"
    ours, plain, chunked = report["measurements"]
    assert ours["policy"] == plain["policy"] == "" and chunked["policy"].startswith(said)
    assert said in (output / "report.html").read_text() and "rope-dual-chunk" in capsys.readouterr().out
    for multiple in ("1", "2"):
        losses = [one["perplexity"]["by_length"][multiple]["loss"] for one in (plain, chunked)]
        assert losses[0] != losses[1]
    why = "ours: attention.kind is 'asentmax': dual_chunk is for softmax"
    line = failing_line(capsys, eval.run.main, runs[0], *given[2:], "--dual_chunk", "128")
    assert line == f"error: dual_chunk is 128, and no run can attend so: {why}"
    assert "dual_chunk is 7: expected at least 8" in failing_line(capsys, eval.run.main, *given, "--dual_chunk", "7")
