"""The generation-speed benchmark, as far as it runs without a CUDA device."""

from pathlib import Path

import pytest
import torch

from benchmarks.decode_speed import (
    EVICTING,
    Row,
    Trained,
    build,
    main,
    measure,
    measure_evicting,
    parse,
    random_prompts,
    show,
)
from benchmarks.train_speed import KINDS, network
from benchmarks.trained_steps import windows
from common.errors import UsageError
from data.store import TokenStore
from model.loading import load_model
from tests.eval.conftest import MakeRun


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_and_decoding_are_timed(kind: str) -> None:
    model = build(network("smoke", kind), torch.device("cpu"))
    assert model.embedding.weight.dtype == torch.bfloat16
    found = measure(model, random_prompts(model, 2, 40), chunk_tokens=32, steps=2, cuda_graphs=False)
    assert found["decode_per_second"] == pytest.approx(2 / (found["step_ms"] / 1e3))
    assert all(0 < value < 1e9 for value in found.values()) and len(found) == 4


@pytest.mark.parametrize("name", EVICTING)
def test_eviction_is_timed_and_holds_less(name: str) -> None:
    model = build(network("smoke", "softmax"), torch.device("cpu"))
    prompts = random_prompts(model, 1, 1000)
    whole = measure(model, prompts, chunk_tokens=500, steps=1, cuda_graphs=False)
    found = measure_evicting(model, prompts[0], name, 0.1, chunk_tokens=500, steps=1)
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


def test_checkpoints_read_held_out_documents(
    corpus: Path, make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [str(make_run(tmp_path / kind, kind, init_std=0.3)) for kind in ("softmax", "asentmax")]
    given = ["--runs", *runs, "--data", str(corpus), "--rows", "2", "--lengths", "64", "96"]
    monkeypatch.setattr("sys.argv", ["decode_speed", *given])
    trained, store = Trained(parse(), torch.device("cpu")), TokenStore(corpus / "heldout")
    for run, (label, model) in zip(runs, trained.models(), strict=True):
        assert label == Path(run).name == model.config.attention.kind and not model.training
        weights = load_model(Path(run)).model.state_dict()
        assert all(model.state_dict()[name].equal(weight.bfloat16()) for name, weight in weights.items())
        prompts = trained.prompts(model, 96)
        assert prompts == [store.document(d)[n : n + 96].tolist() for d, n in windows(store, 96, 2)]
        assert measure(model, prompts, chunk_tokens=64, steps=1, cuda_graphs=False)["prefill_per_second"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runs", "{run}"], "--runs needs --data"),
        (["--data", "{corpus}"], "only --runs reads it"),
        (["--runs", "{run}", "--data", "{corpus}", "--positions", "rope"], "brings models of its own"),
        (["--runs", "{run}", "--data", "{corpus}", "--backend", "torch"], "brings models of its own"),
        (["--runs", "{run}", "--data", "{corpus}", "--lengths", "64", "1048576"], "0 windows of 1048576 tokens"),
        (["--runs", "{corpus}", "--data", "{corpus}"], "checkpoint"),
        (["--evict", "h2o", "--kinds", "entmax"], "--kinds has no softmax"),
    ],
)
def test_errors_come_before_anything_is_measured(
    options: list[str], message: str, corpus: Path, make_run: MakeRun, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = make_run(tmp_path / "run", "softmax")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("sys.argv", ["decode_speed", *(one.format(run=run, corpus=corpus) for one in options)])
    try:
        assert main() == 2
        found = capsys.readouterr().err
    except UsageError as error:
        found = str(error)
    assert message in found and len(found.splitlines()) == 1
