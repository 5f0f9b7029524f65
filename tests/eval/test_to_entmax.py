"""python -m eval.to_entmax: factors of heads, and the run folder that it writes."""

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import eval.calibrate
import eval.run
import eval.search_patterns
import eval.to_entmax
from eval.to_entmax import bounded
from kernels import entmax_attention
from model.attention import Attention, AttentionMetadata
from model.checkpoint import resolve_checkpoint
from model.config import AttentionConfig, ModelConfig
from model.kv_cache import Extension
from model.loading import load_model
from model.override import override_attention
from model.softmax_to_entmax import (
    LARGEST_FACTOR,
    SMALLEST_FACTOR,
    STEPS,
    ConvertedLayer,
    converted_weights,
    find_factors,
    golden_section,
)
from model.transformer import Transformer
from tests.eval.conftest import MakeRun, failing_line
from training.resume.transfer import transfer_weights

SHAPE = ModelConfig(
    vocab_size=50, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=64, positions="rope", init_std=0.5,
    attention=AttentionConfig(kind="softmax"),
)  # fmt: skip
VARIANTS = {
    "rope": {},
    "biases": {"qkv_bias": True},
    "window": {"window": 9},
    "ALiBi": {"positions": "nape"},
    "normalised": {"qk_norm": True},
}


def test_golden_section_finds_each_minimum() -> None:
    wanted = torch.tensor([0.02, 0.35, 0.9, 5.0, 1e-3])
    low, high = torch.full((5,), 2.0**-7), torch.ones(5)
    found = golden_section(lambda x: (x / wanted).log().square(), low, high, 16)
    expected = wanted.clamp(2.0**-7, 1.0)  # a minimum outside: the nearest end
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0)


class _Errors:
    """Squared differences of one layer's entmax outputs at given factors from its softmax outputs, by a head-by-head
    loop in float64."""

    def __init__(self, attention: Attention, factors: list[float], alpha: float) -> None:
        self.attention, self.factors, self.alpha = attention, factors, alpha

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: AttentionMetadata, _: Extension | None
    ) -> None:
        repeat = q.shape[1] // k.shape[1]
        errors = []
        for head in range(q.shape[1]):
            one = [x[:, [i]].double() for x, i in ((q, head), (k, head // repeat), (v, head // repeat))]
            slopes = None if metadata.alibi_slopes is None else metadata.alibi_slopes[[head]]
            given = dict(alibi_slopes=slopes, window=self.attention.config.window, backend="reference")
            softmax = entmax_attention(*one, alpha=1 + 1e-9, **given)
            entmax = [entmax_attention(one[0] * f, *one[1:], alpha=self.alpha, **given) for f in self.factors]
            errors.append([float((out - softmax).square().sum()) for out in entmax])
        self.found = torch.tensor(errors)  # [H, factors]


@pytest.mark.parametrize("variant", VARIANTS)
def test_factors_are_the_best(variant: str) -> None:
    torch.manual_seed(1)
    config = replace(SHAPE, **VARIANTS[variant])
    model, tokens = Transformer(config), torch.randint(50, (2, 40))
    found = find_factors(model, tokens, 1.5, nullcontext())
    for index, layer in enumerate(found):
        inside = ~layer.at_bound  # a local ALiBi head's best factor may be above 1
        assert inside.any() and (layer.error < layer.error_at_1)[inside].all()
        assert ((layer.keys >= 1) & (layer.keys < 20)).all()
        errors = []
        for factor in (0.9, 1.0, 1.1):
            attention = [block.attention for block in model.layers()]
            observers = [_Errors(attention[i], found[i].factor.mul(factor).tolist(), 1.5) for i in range(2)]
            with torch.no_grad(), override_attention(model, observers):
                model(tokens)
            heads = observers[index].found
            errors.append(heads.diagonal() if len(heads) > 1 else heads[:, 0])  # each head's own factor
        less, best, more = (one.sum(0, keepdim=True) if config.qk_norm else one for one in errors)
        inside = inside.any()[None] if config.qk_norm else inside
        assert (best <= less)[inside].all() and (best <= more)[inside].all(), (variant, less, best, more)
        if config.qk_norm:
            assert (layer.factor == layer.factor[0]).all()


@pytest.mark.parametrize(("wanted", "at_bound"), [(2e-3, True), (0.3, False), (3.0, True)])
def test_a_search_that_ends_at_a_bound_is_named(wanted: float, at_bound: bool) -> None:
    low, high = torch.tensor([SMALLEST_FACTOR]), torch.tensor([LARGEST_FACTOR])
    factor = golden_section(lambda x: (x / wanted).log().square(), low, high, STEPS)
    layer = ConvertedLayer(factor, torch.ones(1), torch.ones(1), torch.ones(1))
    assert layer.at_bound.tolist() == [at_bound]
    lines = bounded([ConvertedLayer(*[torch.full((1,), 0.5)] * 4), layer])
    assert len(lines) == at_bound and all("0.0078 to 1 for layer.head 1.0: compare" in line for line in lines)


def test_heads_that_give_nothing_have_no_error() -> None:
    torch.manual_seed(4)
    model = Transformer(SHAPE)
    with torch.no_grad():
        model.layers()[0].attention.wv.weight[:8] = 0  # of one KV head, which two heads read
    layer = find_factors(model, torch.randint(50, (4, 40)), 1.5, nullcontext(), refit=True)[0]
    assert (layer.error[:2] == 0).all() and (layer.error[2:] > 0).all()
    assert layer.refit is not None and bool(layer.refit.weight.isfinite().all())


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_scale_the_scores(variant: str) -> None:
    """entmax of the new weights is entmax of the old weights' queries times the factors."""
    torch.manual_seed(2)
    config = replace(SHAPE, n_layers=1, **VARIANTS[variant])
    old, tokens = Transformer(config), torch.randint(50, (1, 30))
    factor = torch.full((4,), 0.3) if config.qk_norm else torch.tensor([0.1, 0.3, 0.5, 0.9])
    network = replace(config, attention=AttentionConfig(kind="entmax", alpha=1.5))
    new = Transformer(network)
    layer = ConvertedLayer(factor, *[torch.ones(4)] * 3)
    new.load_state_dict(dict(converted_weights(old, network, [layer])))

    def scaled(q, k, v, metadata, _):  # type: ignore[no-untyped-def]
        return entmax_attention(
            q * factor[:, None, None], k, v, alpha=1.5, alibi_slopes=metadata.alibi_slopes, window=config.window
        )

    with torch.no_grad(), override_attention(old, [scaled]):
        torch.testing.assert_close(new(tokens), old(tokens))
        assert not torch.equal(new(tokens), Transformer(network)(tokens))


def test_projections_are_fitted_to_what_is_left() -> None:
    """Of the layer's own outputs; the new weights hold it, and without `refit` the old ones stay."""
    torch.manual_seed(3)
    model, tokens = Transformer(SHAPE), torch.randint(50, (16, 64))
    plain, fitted = (find_factors(model, tokens, 1.5, nullcontext(), refit) for refit in (False, True))
    network = replace(SHAPE, attention=AttentionConfig(kind="entmax", alpha=1.5))
    old, new = (dict(converted_weights(model, network, layers)) for layers in (plain, fitted))
    for index, layer in enumerate(fitted):
        assert torch.equal(layer.factor, plain[index].factor)
        assert layer.refit is not None and layer.refit.error < layer.refit.error_before
        name = f"blocks.{index}.attention.wo.weight"
        assert torch.equal(old[name], model.state_dict()[name]) and torch.equal(new[name], layer.refit.weight)
    assert all(torch.equal(new[name], old[name]) for name in old if "wo.weight" not in name)

    converted = [Transformer(network) for _ in range(2)]
    for one, weights in zip(converted, (old, new), strict=True):
        one.load_state_dict(weights)
    fresh = torch.randint(50, (8, 64))
    with torch.no_grad():
        wanted = model(fresh)
        left = [float((one(fresh) - wanted).norm()) for one in converted]
    assert left[1] < left[0]


def test_the_run_folder(tmp_path: Path, corpus: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_run(tmp_path / "softmax", "softmax", init_std=0.1)
    given = [str(source), "--data", str(corpus), "--output", str(tmp_path / "entmax"), "--length", "64"]
    assert eval.to_entmax.main([*given, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "projected: error, refitted" in printed
    assert "alpha 1.5, 8 windows of 64 tokens" in printed and "configs/stages/converted.yaml" in printed

    alone = [*given[:3], "--output", str(tmp_path / "alone"), "--length", "64", "--samples", "1", "--device", "cpu"]
    assert eval.to_entmax.main(alone) == 0
    printed = capsys.readouterr().out
    assert "one window: projections of outputs stay" in printed and "refitted" not in printed

    loaded = load_model(tmp_path / "entmax")
    assert (loaded.config.attention.kind, loaded.config.attention.alpha, loaded.step) == ("entmax", 1.5, 0)
    network = yaml.safe_load((tmp_path / "entmax" / "network.yaml").read_text())["model"]["network"]
    assert ModelConfig(**{**network, "attention": AttentionConfig(**network["attention"])}) == loaded.config

    both = [str(source), str(tmp_path / "entmax"), "--data", str(corpus), "--output", str(tmp_path / "report")]
    assert eval.run.main([*both, "--lengths", "1", "--needle_samples", "1", "--device", "cpu"]) == 0

    stage = yaml.safe_load(Path("configs/stages/converted.yaml").read_text())["model"]["network"]["attention"]
    goes_on = Transformer(replace(loaded.config, attention=AttentionConfig(**{**network["attention"], **stage})))
    transfer_weights(resolve_checkpoint(tmp_path / "entmax"), goes_on)
    tokens = torch.randint(loaded.config.vocab_size, (1, 100))
    with torch.no_grad():
        near, exact = goes_on.eval()(tokens), loaded.model(tokens)
    assert (near - exact).norm() < 0.05 * exact.norm()  # the temperature starts near 1


def test_outputs_that_overflow_are_refused(
    tmp_path: Path, corpus: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_run(tmp_path / "softmax", "softmax")
    nothing = ConvertedLayer(*[torch.ones(4)] * 4)
    broken = replace(nothing, error=torch.tensor([0.1, torch.nan, 0.1, 0.1]))
    monkeypatch.setattr(eval.to_entmax, "find_factors", lambda *_: [nothing, broken])
    given = [str(source), "--data", str(corpus), "--output", str(tmp_path / "new"), "--length", "64"]
    assert eval.to_entmax.main(given) == 2
    last = capsys.readouterr().err.splitlines()[-1]  # behind a progress bar
    assert "error: attention's outputs of layer 1 are not finite" in last
    assert not (tmp_path / "new").exists()


def test_refusals(
    tmp_path: Path, corpus: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    softmax, entmax = make_run(tmp_path / "softmax", "softmax"), make_run(tmp_path / "asentmax", "asentmax")
    stranger = make_run(tmp_path / "stranger", "softmax", fingerprint="another")
    output, data = ("--output", tmp_path / "new"), ("--data", corpus)

    def line(*arguments: object) -> str:
        return failing_line(capsys, eval.to_entmax.main, *arguments)

    assert "has attention asentmax: expected a softmax model" in line(entmax, *data, *output)
    assert "is not empty: expected a new folder" in line(softmax, *data, "--output", softmax)
    for inside in (softmax / "new", softmax / "checkpoints" / "new", corpus / "train" / "new"):
        assert "which belongs to training: expected a folder elsewhere" in line(softmax, *data, "--output", inside)
    (tmp_path / "file").touch()
    monkeypatch.setattr(eval.to_entmax, "find_factors", None)  # all is refused before minutes of work
    assert "--output" in line(softmax, *data, "--output", tmp_path / "file" / "new")
    assert "another" in line(stranger, *data, *output)
    for alpha in (1.01, 2):
        assert f"alpha is {alpha:.3g}" in line(softmax, *data, *output, "--alpha", alpha)
    assert "length is 129: expected at most the training length, 128" in line(softmax, *data, *output, "--length", 129)
    assert "samples is 0: expected at least 1" in line(softmax, *data, *output, "--samples", 0)
    monkeypatch.setattr(eval.to_entmax, "_memory", lambda device: 2**20)
    assert "all at once, and cpu has 0.0: pass at most --samples" in line(softmax, *data, *output, "--samples", 100)
    monkeypatch.setattr(eval.to_entmax, "choose_windows", lambda *_: [])
    assert "no document of 128 tokens: pass a smaller --length" in line(softmax, *data, *output)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", [eval.to_entmax, eval.search_patterns, eval.calibrate])
def test_damaged_tokens(
    command: Any, tmp_path: Path, corpus: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    softmax = make_run(tmp_path / "softmax", "softmax")
    shutil.copytree(corpus, tmp_path / "damaged")
    for shard in (tmp_path / "damaged" / "train").glob("*.bin"):
        shard.write_bytes(b"\xff" * shard.stat().st_size)
    given = (softmax, "--data", tmp_path / "damaged", "--output", tmp_path / "new", "--length", 128, "--samples", 1)
    assert command.main([str(one) for one in given]) == 2
    last = capsys.readouterr().err.splitlines()[-1]  # behind a progress bar
    assert "error: " in last and "train has token 65535 of" in last
    assert not (tmp_path / "new").exists()
