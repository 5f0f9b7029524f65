"""The generation-speed benchmark, as far as it runs without a CUDA device."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import decode_speed
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
    rates,
    show,
)
from benchmarks.train_speed import KINDS, network
from benchmarks.trained_steps import windows
from data.store import TokenStore
from model.loading import load_model
from model.transformer import Transformer
from tests.benchmarks.conftest import Refused
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
    given = ["--runs", *runs, "--data", str(corpus), "--rows", "9", "--lengths", "64", "96"]
    monkeypatch.setattr("sys.argv", ["decode_speed", *given])
    trained, store = Trained(parse(), torch.device("cpu")), TokenStore(corpus / "heldout")
    for run, (label, model) in zip(runs, trained.models(), strict=True):
        assert label == Path(run).name == model.config.attention.kind and not model.training
        weights = load_model(Path(run)).model.state_dict()
        assert all(model.state_dict()[name].equal(weight.bfloat16()) for name, weight in weights.items())
        prompts, found = trained.prompts(model, 96), windows(store, 96, 9)
        assert prompts == [store.document(d)[n : n + 96].tolist() for d, n in found] and any(n for _, n in found)
        assert measure(model, prompts, chunk_tokens=64, steps=1, cuda_graphs=False)["prefill_per_second"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runs", "{run}"], "--runs needs --data"),
        (["--output", "{corpus}/x.csv"], "is a run's or a corpus's own folder"),
        (["--output", "{folder}"], "is a folder: expected the name of a file"),
        (["--data", "{corpus}"], "only --runs reads it"),
        (["--runs", "{run}", "--data", "{corpus}", "--positions", "rope"], "brings models of its own"),
        (["--runs", "{run}", "--data", "{corpus}", "--backend", "torch"], "brings models of its own"),
        (["--runs", "{run}", "--data", "{corpus}", "--lengths", "64", "1048576"], "0 windows of 1048576 tokens"),
        (["--runs", "{corpus}", "--data", "{corpus}"], "checkpoint"),
        (["--evict", "h2o", "--kinds", "entmax"], "--kinds has no softmax"),
        (["--evict", "h2o", "--runs", "{sparse}", "--data", "{corpus}"], "--evict is h2o, but --runs are asentmax"),
        (["--runs", "{run}", "--data", "{corpus}", "--rows", "9999"], "set --lengths or --rows lower"),
        (["--keep", "1.5"], "--keep is 1.5: expected a share in (0, 1]"),
    ],
)
def test_errors_come_before_anything_is_measured(
    options: list[str], message: str, corpus: Path, make_run: MakeRun, tmp_path: Path, refused: Refused
) -> None:
    places = dict(run=make_run(tmp_path / "run", "softmax"), sparse=make_run(tmp_path / "x", "asentmax"))
    places |= dict(corpus=corpus, folder=tmp_path)
    assert message in refused(main, [one.format(**places) for one in options])


@dataclass
class Measured:
    """What the command asked for: the model, its prompts, and the other arguments."""

    model: Transformer
    prompts: list[list[int]]
    more: dict[str, Any]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Measured]:
    """The command on a CPU, with stand-ins for what takes time."""
    found: list[Measured] = []

    def own(model: Transformer, prompts: list[list[int]], **more: Any) -> dict[str, float]:
        found.append(Measured(model, prompts, more))
        return dict(prefill_per_second=1e5, decode_per_second=1e2, step_ms=10.0, cache_mib=1.0)

    def evicted(model: Transformer, prompt: list[int], name: str, keep: float, **more: Any) -> dict[str, float]:
        return own(model, [prompt], policy=name, keep=keep, **more)

    monkeypatch.setattr(decode_speed, "DEVICE", "cpu")
    monkeypatch.setattr(decode_speed, "measure", own)
    monkeypatch.setattr(decode_speed, "measure_evicting", evicted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    return found


def rows_of(monkeypatch: pytest.MonkeyPatch, path: Path, *options: str) -> list[tuple[str, ...]]:
    """Of the table that the command writes: model, attention, positions, length, rows."""
    monkeypatch.setattr("sys.argv", ["decode_speed", "--output", str(path / "rows.csv"), *options])
    assert main() == 0
    with (path / "rows.csv").open() as file:
        return [tuple(row[name] for name in list(row)[:5]) for row in csv.DictReader(file)]


def test_fresh_models_are_those_asked_for(
    asked: list[Measured], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ("--models", "smoke", "--lengths", "48", "--rows", "2")
    assert rows_of(monkeypatch, tmp_path, *size) == [
        ("smoke", kind, "nape", "48", "2") for kind in ("softmax", "entmax")
    ]
    assert "kernel by kernel" in capsys.readouterr().out and [one.more["cuda_graphs"] for one in asked] == [False] * 2
    more = ("--backend", "torch", "--cuda_graphs", "--steps", "3", "--chunk_tokens", "16")
    kinds = ("--kinds", "softmax", "entmax", "--positions", "rope", "nope", "--evict", "h2o", "--keep", "0.3")
    rows = rows_of(monkeypatch, tmp_path, *size, *more, *kinds)
    assert rows == [
        ("smoke", attention, positions, "48", "1" if attention == "h2o" else "2")
        for kind in ("softmax", "entmax")
        for positions in ("rope", "nope")
        for attention in ([kind, "h2o"] if kind == "softmax" else [kind])
    ]
    last = asked[2:]
    assert {one.model.config.attention.backend for one in last} == {"torch"}
    assert [one.model.config.positions for one in last] == [row[2] for row in rows]
    assert all((one.more["steps"], one.more["chunk_tokens"]) == (3, 16) for one in last)
    evicting = [one.more for one in last if "policy" in one.more]
    assert [(one["policy"], one["keep"]) for one in evicting] == [("h2o", 0.3)] * 2
    assert (
        all(one.more["cuda_graphs"] for one in last if "policy" not in one.more) and "graphs" in capsys.readouterr().out
    )
    assert last[0].prompts == random_prompts(last[0].model, 2, 48) and last[1].prompts == last[0].prompts[:1]


def test_runs_are_measured_on_their_own_prompts(
    asked: list[Measured], corpus: Path, make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [str(make_run(tmp_path / name, kind)) for name, kind in (("dense", "softmax"), ("sparse", "asentmax"))]
    rows = rows_of(monkeypatch, tmp_path, "--runs", *runs, "--data", str(corpus), "--lengths", "64", "--evict", "h2o")
    assert [row[:2] for row in rows] == [("dense", "softmax"), ("dense", "h2o"), ("sparse", "asentmax")]
    document, start = windows(store := TokenStore(corpus / "heldout"), 64, 1)[0]
    assert all(one.prompts == [store.document(document)[start : start + 64].tolist()] for one in asked)
    assert [one.model.config.attention.kind for one in asked] == ["softmax", "softmax", "asentmax"]


def test_rates_are_of_all_rows() -> None:
    found = rates(3, 100, 2.0, 2**21, {"step_ms": 20.0})
    assert found == dict(prefill_per_second=150.0, decode_per_second=150.0, step_ms=20.0, cache_mib=2.0)
