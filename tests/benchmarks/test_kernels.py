"""The kernel benchmark's workloads, oracle, checks and reports, on the CPU; its timing needs a CUDA device."""

import csv
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import dump_qkv, errors, kernels, measure
from benchmarks.oracle import attention_oracle
from benchmarks.peers import DEFAULT_PEERS, PEERS, Implementation, Unsupported
from benchmarks.report import Report, crossing, interpolated, plot_speed_up, write_csv
from benchmarks.suites import QKV_SUITES, SUITES
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
from common.errors import UsageError
from kernels import entmax, entmax_attention
from model.config import AttentionConfig, ModelConfig
from model.transformer import Transformer

CPU = dict(device="cpu", dtype=torch.float32)
GENERATORS: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {
    "topics": lambda *shape, **options: topics(*shape, 4, **options),
    "shifted": lambda *shape, **options: topics(*shape, 4, shift=SHIFT, **options),
    "gaussian": gaussian,
    "sink_and_window": sink_and_window,
}
REFERENCE = Implementation(
    "ours, dense",
    "entmax",
    lambda w: lambda: entmax_attention(w.q, w.k, w.v, backend="torch", **w.options),  # type: ignore[arg-type, return-value]
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def live_tiles(q: Tensor, k: Tensor, first: int) -> Tensor:
    """Bool (T / 64 - first, T / 64) of the first head, True where a tile holds support; rows from tile `first` on."""
    scores = q[0, 0, 64 * first :] @ k[0, 0].T * k.shape[3] ** -0.5
    seen = torch.ones_like(scores, dtype=torch.bool).tril(64 * first)
    p = entmax(scores.masked_fill(~seen, -torch.inf))
    return p.unflatten(0, (-1, 64)).unflatten(2, (-1, 64)).amax((1, 3)) > 0


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_repeat_themselves(name: str) -> None:
    make = GENERATORS[name]
    first, again, other = make(192, 2, 32, seed=1, **CPU), make(192, 2, 32, seed=1, **CPU), make(192, 2, 32, **CPU)
    for a, b, c in zip(first, again, other, strict=True):
        assert a.shape == (1, 2, 192, 32) and a.dtype == torch.float32 and a.is_contiguous()
        assert torch.equal(a, b) and not torch.equal(a, c)
    assert make(100, 1, 64, device="cpu")[0].dtype == torch.bfloat16


def test_live_share_follows_the_number_of_topics() -> None:
    """Late rows only: before a topic's first key block a row has nothing to prefer."""

    def late_share(n_topics: int, shift: int = 0) -> float:
        q, k, _ = topics(3072, 1, 64, n_topics, shift=shift, **CPU)
        return float(live_tiles(q, k, 42)[:, :42].float().mean())

    one, four, eight = late_share(1), late_share(4), late_share(8)
    assert one > 0.95
    assert 0.15 < four < 0.4
    assert 0.06 < eight < 0.25
    assert late_share(4, SHIFT) > 1.3 * four  # a block of keys now lies in two tiles


def test_sink_and_window_is_live_where_it_says() -> None:
    q, k, _ = sink_and_window(2048, 1, 64, **CPU)
    live = live_tiles(q, k, 16)
    rows = torch.arange(16, 32)
    assert live[:, 0].all()
    assert live[rows - 16, rows].all() and live[rows - 16, rows - 1].all()
    far = live & (torch.arange(32) > 0) & (torch.arange(32) < rows[:, None] - 5)
    assert 0 < far.sum() < 0.15 * 16 * 18
    with pytest.raises(ValueError, match="at least 32"):
        sink_and_window(64, 1, 16, **CPU)


def test_gaussian_support_is_everywhere() -> None:
    q, k, _ = gaussian(1024, 1, 64, **CPU)
    live = live_tiles(q, k, 8)
    assert live[:, :8].float().mean() > 0.98


@pytest.mark.parametrize("seed", range(5))
def test_document_lengths(seed: int) -> None:
    lengths = document_lengths(65536, seed=seed)
    assert sum(lengths) == 65536 and min(lengths) >= 1024 and max(lengths) <= 16384
    assert lengths == document_lengths(65536, seed=seed) != document_lengths(65536, seed=seed + 1)


def small_workload(**options) -> Workload:
    q, k, v = gaussian(150, 2, 16, **CPU)
    return Workload("small", q, k[:, :1].contiguous(), v[:, :1].contiguous(), **options)


def test_documents_of_a_packed_workload() -> None:
    workload = packed(small_workload(), [3, 0, 100, 47])
    assert workload.cu_seqlens is not None and workload.cu_seqlens.tolist() == [0, 3, 3, 103, 150]
    documents = workload.documents()
    assert [x.q.shape[2] for x in documents] == [3, 100, 47] and all(x.cu_seqlens is None for x in documents)
    assert torch.equal(documents[1].k, workload.k[:, :, 3:103])
    part = workload.part(50, 120)
    assert part.cu_seqlens is not None and part.cu_seqlens.tolist() == [0, 0, 0, 53, 70]


@pytest.mark.parametrize("alpha", errors.ALPHAS)
def test_oracle_is_the_reference_in_float64(alpha: float) -> None:
    q, k, v = (x.double().requires_grad_() for x in gaussian(70, 4, 16, **CPU))
    k, v = (x[:, :2].detach().requires_grad_() for x in (k, v))
    geometry = dict(cu_seqlens=torch.tensor([0, 1, 1, 40, 70], dtype=torch.int32), alibi_slopes=linear_slopes(4, "cpu"))
    alphas = torch.full((4,), alpha, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(q.shape, dtype=torch.float64)
    out = entmax_attention(q, k, v, alpha=alphas, backend="reference", **geometry)  # type: ignore[arg-type]
    truth = (out, *torch.autograd.grad(out, (q, k, v, alphas), grad))  # type: ignore[arg-type]
    oracle = attention_oracle(q, k, v, grad, alphas, **geometry)
    for name, x in zip(errors.NAMES, truth, strict=True):
        torch.testing.assert_close(oracle[name], x, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_oracle_rounds_to_the_input_dtype() -> None:
    q, k, v = gaussian(100, 2, 32, device="cpu")
    alpha, grad = torch.full((2,), 1.5), gaussian(100, 2, 32, seed=1, device="cpu")[2]
    rounded = attention_oracle(q, k, v, grad, alpha)
    exact = attention_oracle(q.double(), k.double(), v.double(), grad.double(), alpha)
    assert rounded["out"].dtype == torch.bfloat16 and rounded["dalpha"].dtype == torch.float32
    for name in errors.NAMES:
        error = measure.relative_error(rounded[name], exact[name])
        assert 1e-4 < error < (5e-2 if name == "dalpha" else 1e-2), (name, error)
    assert (rounded["tau"] - exact["tau"]).abs().max() < 1e-5


def test_threshold_bar() -> None:
    assert errors.threshold_bar(0.0) == errors.threshold_bar(1.0) == 1e-5
    assert errors.threshold_bar(40.0) == 4 * 2.0**-18


@pytest.mark.parametrize(
    "workload",
    [
        small_workload(),
        small_workload(alpha=torch.tensor([1.2, 1.9], requires_grad=True), alibi_slopes=torch.tensor([1.0, 0.0])),
        packed(small_workload(alpha=torch.tensor([1.2, 1.5], requires_grad=True)), [60, 0, 90]),
    ],
    ids=["plain", "learned alpha, ALiBi", "packed"],
)
def test_checks(workload: Workload) -> None:
    """They pass what is right and name the row and the tensor of what is wrong."""
    assert measure.check(workload, REFERENCE, REFERENCE.prepare(workload)) == ""

    def spoilt(part: Workload) -> Callable[[], Tensor]:
        return lambda: 1.01 * REFERENCE.prepare(part)()

    with pytest.raises(measure.CheckFailed, match="small, ours, spoilt: out of the last queries off by 1.0e-02"):
        measure.check(workload, replace(REFERENCE, name="ours, spoilt", prepare=spoilt), spoilt(workload))
    peer = replace(REFERENCE, name="peer", prepare=spoilt)
    assert measure.check(workload, peer, spoilt(workload)).startswith("out of the last queries off")
    with pytest.raises(measure.CheckFailed, match="small: out is not finite"):
        measure.check_finite("small", dict(out=torch.tensor([1.0, math.nan])))


def test_checks_know_softmax() -> None:
    workload = small_workload(alibi_slopes=torch.tensor([1.0, 0.5]))

    def softmax(w: Workload) -> Callable[[], Tensor]:
        return lambda: torch.nn.functional.scaled_dot_product_attention(w.q, w.k, w.v, is_causal=True, enable_gqa=True)

    peer = Implementation("peer", "softmax", softmax, takes_bias=False)
    assert measure.check(workload, peer, softmax(workload)) == ""
    assert "out of the last queries" in measure.check(workload, replace(peer, takes_bias=True), softmax(workload))


def test_missing_peers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(DEFAULT_PEERS) == set(PEERS) - {"adasplash"}
    monkeypatch.setitem(__import__("sys").modules, "adasplash", None)
    workload = Workload("power of two", *gaussian(64, 2, 16, **CPU))
    found = measure.measure(workload, PEERS["adasplash"], measure.Repeats.quick())
    assert found.both is None and found.note.startswith("not installed")
    for peer, reason in (("varlen", "packed documents"), ("flash", "takes no packed documents")):
        with pytest.raises(Unsupported, match=reason):
            PEERS[peer].prepare(workload if peer == "varlen" else packed(workload, [4, 60]))


def test_crossing_interpolates() -> None:
    assert crossing([10, 20, 40], [1.0, 2.0, 4.0], [3.0, 3.0, 3.0]) == pytest.approx(30)
    assert crossing([40, 10, 20], [4.0, 1.0, 2.0], [3.0, 3.0, 3.0]) == pytest.approx(30)
    assert crossing([10, 20], [1.0, 2.0], [3.0, 5.0]) == math.inf
    assert crossing([10, 20], [4.0, 5.0], [3.0, 3.0]) is None
    assert crossing([], [], []) is None
    assert interpolated([30, 10], [3.0, 2.0], 15) == pytest.approx(2.25)
    assert interpolated([10, 30], [2.0, 3.0], 31) is None


def test_report_writes_tables_csv_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(tmp_path / "new" / "folder", ["GPU, versions", "command"])
    report.start("density", "a title", {"workload": 12, "implementation": 14, "ms": 6, "note": 1})
    for share, time in ((13.0, 5.0), (50.0, 9.5)):
        report.add({"workload": "x", "T": 64, "live %": share, "implementation": "ours", "ms": time, "/ ours": 1.0})
        peer = {"implementation": "FA2", "ms": 26.0, "/ ours": 26 / time, "note": "a, b"}
        report.add({"workload": "x", "T": 64, "live %": share, **peer})
    report.add({"workload": "x", "T": 64, "implementation": "AdaSplash-2", "ms": None, "note": "not installed"})
    printed = capsys.readouterr().out
    assert printed == (report.folder / "density.txt").read_text()
    lines = printed.splitlines()
    assert lines[3] == "## density: a title"
    assert lines[6] == "x             FA2                 26  a, b"
    assert lines[-1].split() == ["x", "AdaSplash-2", "-", "not", "installed"]
    with (report.folder / "density.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[1]["/ ours"] == "5.2" and rows[1]["note"] == "a, b" and rows[4]["ms"] == "" and len(rows) == 5
    for x in ("live %", "T"):
        path = plot_speed_up(report.rows["density"], x, tmp_path / "plot.png", "Title")
        assert path.stat().st_size > 5000
    write_csv([{"a": 1}, {"b": None}], tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_text().split() == ["a,b", "1,", ","]


def test_without_cuda(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.main(["--output", str(tmp_path / "none")]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: python -m benchmarks.kernels needs a CUDA device, and torch finds none\n"
    assert captured.out == "" and not (tmp_path / "none").exists()


def test_arguments() -> None:
    options = kernels.parse([])
    assert options.suite == ["table"] and options.peers == list(DEFAULT_PEERS) and not options.quick
    assert kernels.parse(["--suite", *(set(SUITES) - set(QKV_SUITES)), "--peers"]).peers == []
    with pytest.raises(UsageError, match="--suite checkpoint needs --qkv FILE"):
        kernels.parse(["--suite", "checkpoint"])


def test_dump_of_a_model(tmp_path: Path) -> None:
    sizes = dict(vocab_size=50, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=32)
    network = Transformer(ModelConfig(**sizes, attention=AttentionConfig(kind="asentmax")))  # type: ignore[arg-type]
    tokens = torch.randint(50, (1, 90))
    (content,) = dump_qkv.capture(network, tokens, [-1])
    assert content["q"].shape == (1, 4, 90, 8) and content["k"].shape == (1, 2, 90, 8)
    assert content["alibi_slopes"].tolist() == [1, 0.5, 0, 0]
    layers = dump_qkv.capture(network, tokens, [0, 1])
    assert not torch.equal(content["q"], layers[0]["q"]) and torch.equal(content["q"], layers[1]["q"])
    torch.save(dict(layers=layers), tmp_path / "all.pt")
    assert [layer.q.shape for layer in load_layers(tmp_path / "all.pt", "cpu", torch.float32)] == [(1, 4, 90, 8)] * 2
    torch.save(content, tmp_path / "qkv.pt")
    workload = load_qkv(tmp_path / "qkv.pt", "cpu", torch.float32)
    assert workload.name == "qkv" and len(workload.inputs(True)) == 4
    assert measure.check(workload, REFERENCE, REFERENCE.prepare(workload)) == ""
    with pytest.raises(ValueError, match="layers"):
        dump_qkv.capture(network, tokens, [2])
    torch.save(dict(q=content["q"]), tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="lacks alpha, k, v"):
        load_qkv(tmp_path / "bad.pt", "cpu", torch.float32)
