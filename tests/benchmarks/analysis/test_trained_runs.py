"""The analyses that results/ cites, on tiny runs."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.analysis import gradients, temperature_at_length, windowed_loss
from benchmarks.analysis.reading import configured, long_documents
from data.store import TokenStore
from model.attention import make_metadata
from model.config import AttentionConfig, ModelConfig
from model.transformer import Transformer
from tests.eval.conftest import BASE_LENGTH, MakeRun

QUICK = ["--headline_tokens", "300", "--max_documents", "2", "--needle_samples", "1", "--needle_depths", "2"]
QUICK += ["--lengths", "1", "2", "--profile_queries", "8", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "asentmax", "asentmax", init_std=0.2)


def tiny(kind: str, positions: str = "nape", init_std: float = 0.5) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=32, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, init_std=init_std,
        positions=positions, attention=AttentionConfig(kind=kind),  # type: ignore[arg-type]
    )  # fmt: skip
    return Transformer(config)


def test_the_clamped_temperature_is_that_of_the_last_trained_position() -> None:
    attention = tiny("asentmax").blocks[0].attention
    x = torch.randn(1, 1, 32).expand(1, 12, 32)
    metadata = make_metadata(attention.config, 12, None, None, x.device)
    before = attention._head_temperatures(x, metadata)
    with temperature_at_length.replaced(*temperature_at_length.clamped(5)):
        found = attention._head_temperatures(x, metadata)
    torch.testing.assert_close(found[..., :5], before[..., :5])
    torch.testing.assert_close(found[..., 5:], found[..., 4:5].expand(1, 4, 7))  # vectors of several widths: not equal
    assert not torch.allclose(found, before) and torch.equal(attention._head_temperatures(x, metadata), before)


@pytest.mark.parametrize("kind", ["asentmax", "entmax"])
def test_scores_of_position_free_heads_fall_with_the_keys(kind: str) -> None:
    attention = tiny(kind).blocks[0].attention
    x, free = torch.randn(2, 12, 32), attention.config.n_alibi_heads
    metadata = make_metadata(attention.config, 12, None, None, x.device)
    before = attention._head_temperatures(x, metadata)
    before = torch.ones(2, 4, 12) if before is None else before
    with temperature_at_length.replaced(*temperature_at_length.scaled(1.0, 5)):
        found = attention._head_temperatures(x, metadata)
    assert free == 2 and torch.equal(found[:, :free], before[:, :free])
    alpha = attention.alpha(x.device)[free:, None]
    wanted = (5 / torch.arange(1, 13).clamp(min=5)) ** (alpha - 1)
    torch.testing.assert_close(found[:, free:], before[:, free:] * wanted)
    assert attention._head_temperatures(x, metadata) is None or kind == "asentmax"


def test_softmax_has_no_scores_to_scale() -> None:
    attention = tiny("softmax").blocks[0].attention
    metadata = make_metadata(attention.config, 12, None, None, torch.device("cpu"))
    with temperature_at_length.replaced(*temperature_at_length.scaled(1.0, 5)):
        assert attention._head_temperatures(torch.randn(2, 12, 32), metadata) is None


def test_a_changed_evaluation_keeps_its_results_to_itself(
    corpus: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(run), "--data", str(corpus), "--output", str(tmp_path / "report"), *QUICK]
    for _ in range(2):
        assert temperature_at_length.main(["--clamp", "64", "--", *arguments]) == 0
    assert "reusing" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "plots", "report.html", "report.json", "report.md", "results-changed",
    ]  # fmt: skip
    changed = json.loads((tmp_path / "report/report.json").read_text())["runs"][0]["perplexity"]["value"]
    assert temperature_at_length.run.main(arguments) == 0
    assert json.loads((tmp_path / "report/report.json").read_text())["runs"][0]["perplexity"]["value"] != changed
    capsys.readouterr()
    assert temperature_at_length.main(["--clamp", "64", "--", *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: --output") and (tmp_path / "report/results").is_dir()
    assert temperature_at_length.main(["--clamp", "64", "--", *arguments[:3]]) == 2
    assert "no --output behind --" in capsys.readouterr().err


def test_gradients_against_the_exact_ones(corpus: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gradients.main([str(run), "--data", str(corpus), "--tokens", "200", "--device", "cpu"]) == 2
    assert "has no document of 201 tokens" in capsys.readouterr().err  # of every 37th from the 11th on
    model = tiny("asentmax", init_std=0.1)  # larger scores have gradients that bfloat16 does not find
    batch = torch.randint(32, (2, 97))
    same, rounded = gradients.compare(model, batch, "reference")
    assert same.error < 1e-4 and same.cosine > 1 - 1e-6 and same.norm == pytest.approx(same.exact_norm, rel=1e-4)
    assert 1e-4 < rounded.error < 1 and rounded.precision == "bfloat16"
    assert model.config.attention.backend == "auto" == model.blocks[0].attention.config.attention.backend


def test_temperatures_and_scores_are_those_of_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny("asentmax"), torch.randint(32, (2, 130))
    found = gradients.layers(model, tokens, None)
    assert len(found) == 2 and all(block.attention.override is None for block in model.layers())
    attention = model.blocks[0].attention
    metadata = make_metadata(model.config, 130, None, None, tokens.device)
    x = model.blocks[0].attention_norm(model.embedding(tokens))
    q, k, _, temperature = attention.attended(x, metadata)
    scores = (q[:, :, ::64] @ k.repeat_interleave(2, 1).mT) * model.config.head_size**-0.5
    assert found[0].largest_scores == pytest.approx(scores.abs().amax((0, 2, 3)).tolist(), rel=1e-4)
    assert found[0].temperatures == pytest.approx(temperature[:, 2:].mean((0, 2)).tolist(), rel=1e-4)
    assert found[0].largest_temperatures == pytest.approx(temperature[:, 2:].amax((0, 2)).tolist(), rel=1e-4)


def test_gradients_of_a_run_are_printed(
    corpus: Path, run: Path, make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(gradients, "FIRST", 0)
    monkeypatch.setattr(gradients, "STEP", 1)
    options = ["--data", str(corpus), "--tokens", "64", "--device", "cpu"]
    assert gradients.main([str(run), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 * 3 + 2 and lines[1].split()[:2] == ["0", "float32"]
    assert lines[-1].startswith("layer 1: mean temperatures ")
    assert gradients.main([str(make_run(tmp_path / "softmax", "softmax")), *options]) == 2
    assert "has attention kind 'softmax': expected asentmax" in capsys.readouterr().err


def test_losses_by_position_within_a_window(corpus: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edges = ["0", "64", "128", "200"]
    options = ["--data", str(corpus), "--edges", *edges, "--window", "64", "--documents", "3", "--few", "1"]
    assert windowed_loss.main([str(run), *options, "--device", "cpu"]) == 0
    head, whole, windowed, few, by_torch = capsys.readouterr().out.splitlines()
    values = [[float(x) for x in line.split(": ")[-1].split(", ")] for line in (whole, windowed, few, by_torch)]
    assert (
        head == "positions 0 64 128 200, nats"
        and "3 documents, window 64" in windowed
        and "1 document, as it is" in few
    )
    assert values[0][0] == values[1][0] and values[0][1:] != values[1][1:]  # a window is the first range
    assert values[2] == pytest.approx(values[3], abs=2e-4) and values[0] != values[2]
    assert windowed_loss.main([str(run), "--data", str(corpus), "--edges", "5", "5"]) == 2
    assert "expected two rising positions" in capsys.readouterr().err


def test_a_uniform_model_has_the_same_loss_everywhere() -> None:
    model = tiny("entmax")
    torch.nn.init.zeros_(model.embedding.weight)
    found = windowed_loss.losses(model, model.config, torch.randint(32, (2, 41)), [0, 8, 40])
    assert found == pytest.approx([math.log(32)] * 2)


def test_documents_and_configurations(corpus: Path) -> None:
    store = TokenStore(corpus / "heldout")
    documents = long_documents(corpus / "heldout", BASE_LENGTH, 2)
    first = next(i for i, length in enumerate(store.lengths) if length >= BASE_LENGTH)
    assert documents.shape == (2, BASE_LENGTH) and documents[0].tolist() == store.document(first)[:BASE_LENGTH].tolist()
    model, other = tiny("entmax"), tiny("entmax", "nope").config
    with pytest.raises(RuntimeError), configured(model, other):
        assert model.config is other is model.blocks[1].attention.config
        raise RuntimeError
    assert model.config is not other and model.blocks[1].attention.config is model.config
