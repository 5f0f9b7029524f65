"""The decoder: documents, positions, temperatures, initialisation, statistics."""

import dataclasses
from typing import get_args

import pytest
import torch
from torch.nn import functional as F

from model.attention import make_metadata
from model.attention_stats import attention_stats
from model.config import (
    AttentionConfig,
    AttentionKind,
    DMSConfig,
    DSAConfig,
    HierarchicalConfig,
    ModelConfig,
    NSAConfig,
    Positions,
    config_from_dict,
)
from model.initial_weights import take_memory
from model.layers import HeadAlpha
from model.rotary import rotary_tables, rotate
from model.sparse_attention import collected_auxiliary
from model.transformer import Transformer

DOCUMENTS = torch.tensor([0, 30, 30, 31, 100, 128], dtype=torch.int32)
NSA = NSAConfig(compress_length=8, compress_stride=4, select_block=8, select_count=4, window=10)
SPARSE = {
    "nsa": {"nsa": NSA},
    "dsa": {"dsa": DSAConfig(index_dim=8, select_tokens=9)},
    # decisions that differ, and none so sure that nothing learns
    "dms": {"dms": DMSConfig(window=9, scale=1.0, offset=-0.5)},
    "hierarchical": {"hierarchical": HierarchicalConfig(block=8)},
}
KINDS, POSITIONS = get_args(AttentionKind), get_args(Positions)


def tiny(kind: AttentionKind = "asentmax", positions: Positions = "nape", **options) -> ModelConfig:
    if kind in SPARSE:
        if options.get("window"):
            pytest.skip("it is sparse without a window, or has one of its own")
        options.setdefault("attention", SPARSE[kind])
    attention = AttentionConfig(kind=kind, **options.pop("attention", {}))
    sizes = dict(vocab_size=97, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48)
    return ModelConfig(**{**sizes, **options}, positions=positions, attention=attention)


def make(config: ModelConfig, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():  # larger than at initialisation, so that a wrong attention would show
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def tokens(n: int = 128) -> torch.Tensor:
    return torch.randint(0, 97, (1, n), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_equal_single_ones(kind: AttentionKind, positions: Positions, window: int | None) -> None:
    model = make(tiny(kind, positions, window=window, qk_norm=True))
    packed = model(tokens(), DOCUMENTS, 128)
    bounds = DOCUMENTS.tolist()
    alone = [model(tokens()[:, a:b]) for a, b in zip(bounds, bounds[1:], strict=False) if b > a]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_causal_and_trainable(kind: AttentionKind) -> None:
    model = make(tiny(kind))
    changed = tokens().clone()
    changed[0, 64:] = 0
    torch.testing.assert_close(model(tokens())[:, :64], model(changed)[:, :64], atol=2e-5, rtol=1e-4)
    with collected_auxiliary(model) as losses:
        hidden = model(tokens(), DOCUMENTS)
    (model.logits(hidden).logsumexp(-1).mean() + sum(losses)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters())


def test_batch_rows_are_independent() -> None:
    model = make(tiny())
    batch = torch.cat([tokens(), tokens().flip(1)])
    torch.testing.assert_close(model(batch)[1:], model(batch[1:]), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("positions", POSITIONS)
def test_softmax_path_is_softmax_of_biased_scores(positions: Positions) -> None:
    """The attention block written out densely."""
    config = tiny("softmax", positions, window=20)
    attention = make(config).blocks[0].attention
    x = torch.randn(1, 50, 32)
    metadata = make_metadata(config, 50, None, None, x.device)
    q, k, v = (w(x).unflatten(-1, (-1, 8)).transpose(1, 2) for w in (attention.wq, attention.wk, attention.wv))
    if metadata.rotary is not None:
        q, k = rotate(q, *metadata.rotary), rotate(k, *metadata.rotary)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    distance = torch.arange(50)[:, None] - torch.arange(50)
    slopes = torch.tensor([1.0, 0.5, 0, 0]) if positions == "nape" else torch.zeros(4)
    scores = q @ k.transpose(2, 3) / 8**0.5 - slopes[:, None, None] * distance
    scores = scores.masked_fill((distance < 0) | (distance >= 20), -torch.inf)
    expected = attention.wo((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, metadata), expected, atol=1e-5, rtol=1e-4)


def test_asentmax_temperature_is_the_papers_and_leaves_alibi_heads() -> None:
    config = tiny("asentmax", attention=dict(temperature_offset=0.7, temperature_range=1.3))
    attention = make(config).blocks[0].attention
    x = torch.randn(1, 128, 32)
    metadata = make_metadata(config, 128, DOCUMENTS, None, x.device)
    ours = attention._head_temperatures(x, metadata)
    position = torch.cat([torch.arange(n) for n in DOCUMENTS.diff().tolist()]).float()
    beta = F.softplus(F.linear(x, attention.temperature.beta.weight, attention.temperature.beta.bias))
    gamma = torch.tanh(F.linear(x, attention.temperature.gamma.weight, attention.temperature.gamma.bias))
    expected = 0.7 + beta * torch.log(2 + position)[None, :, None] ** (1.3 * gamma)
    assert (ours[:, :2] == 1).all()
    torch.testing.assert_close(ours[:, 2:], expected.transpose(1, 2))


def test_ssmax_scales_by_log_position() -> None:
    config = tiny("ssmax", "nope")
    attention = make(config).blocks[0].attention
    metadata = make_metadata(config, 10, None, None, torch.device("cpu"))
    ours = attention._head_temperatures(torch.randn(1, 10, 32), metadata)
    expected = attention.temperature.scalar[:, None] * torch.log(torch.arange(2, 12).float())
    torch.testing.assert_close(ours[0], expected)


def test_rotary_scores_depend_on_distance_only() -> None:
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(i: int, j: int) -> torch.Tensor:
        config = tiny(positions="rope", rope_base=100.0)
        tables = [rotary_tables(torch.tensor([n]), config, torch.tensor(n)) for n in (i, j)]
        return (rotate(q, *tables[0]) * rotate(k, *tables[1])).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100), atol=1e-4, rtol=1e-4)
    assert (score(7, 3) - score(7, 4)).abs() > 1e-3


@pytest.mark.parametrize(
    ("slopes", "expected"), [("linear", [1, 1 / 2, 1 / 3, 1 / 4]), ("exp", [1, 1 / 2, 1 / 4, 1 / 8])]
)
def test_nape_slopes(slopes, expected) -> None:
    config = tiny(n_heads=8, n_kv_heads=2, nape_slopes=slopes)
    metadata = make_metadata(config, 4, None, None, torch.device("cpu"))
    torch.testing.assert_close(metadata.alibi_slopes, torch.tensor([*expected, 0, 0, 0, 0]))


def test_alpha_starts_as_configured_and_stays_inside() -> None:
    config = AttentionConfig(alpha=1.3, alpha_min=1.1, alpha_max=1.8)
    alpha = HeadAlpha(config, 3)
    torch.testing.assert_close(alpha(torch.device("cpu")), torch.full((3,), 1.3))
    for raw, bound in ((1e4, 1.8), (-1e4, 1.1)):
        torch.nn.init.constant_(alpha.alpha_raw, raw)
        torch.testing.assert_close(alpha(torch.device("cpu")), torch.full((3,), bound))
    fixed = HeadAlpha(dataclasses.replace(config, learn_alpha=False), 3)
    assert not list(fixed.parameters()) and fixed(torch.device("cpu")).tolist() == pytest.approx([1.3] * 3)


def test_initialisation_scales_with_depth() -> None:
    torch.manual_seed(0)
    config = tiny(n_layers=8, d_model=128, d_ff=256, tie_embeddings=False)
    model = Transformer(config)
    deviation = {name: p.std().item() for name, p in model.named_parameters() if p.dim() == 2}
    for name, found in deviation.items():
        expected = 0.02 / 4 if name.endswith(("wo.weight", "w_down.weight")) else 0.02
        assert found == pytest.approx(expected, rel=0.2 if "temperature" in name else 0.05), name
    assert torch.equal(model.alphas(), torch.full((8, 4), 1.5))


def test_scalars_of_ssmax_by_layer_and_scaled_head() -> None:
    model = Transformer(tiny("ssmax", "nape"))
    scalars = model.temperature_scalars()
    assert scalars is not None and scalars.shape == (model.config.n_layers, 2)  # of the position-free heads
    assert torch.equal(scalars[0], model.layers()[0].attention.temperature.scalar)
    assert Transformer(tiny()).temperature_scalars() is None


def weights_of(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in seeded(config, seed).named_parameters()}


def seeded(config: ModelConfig, seed: int = 0, deferred: bool = False) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(config, deferred)


def test_a_deferred_model_starts_like_a_real_one() -> None:
    real, empty = seeded(tiny()), seeded(tiny(), deferred=True)
    assert all(parameter.is_meta for parameter in empty.parameters())
    take_memory(empty, torch.device("cpu"))
    empty.init_weights()
    for (name, a), (_, b) in zip(real.named_parameters(), empty.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert empty.head_weight is empty.embedding.weight


def test_twins_share_their_initial_weights_and_seeds_do_not() -> None:
    softmax, entmax, other = weights_of(tiny("softmax")), weights_of(tiny("asentmax")), weights_of(tiny("softmax"), 1)
    assert softmax.keys() < entmax.keys()
    assert all(torch.equal(weight, entmax[name]) for name, weight in softmax.items())
    drawn = [name for name, weight in softmax.items() if weight.std() > 0]
    assert drawn and not any(torch.equal(softmax[name], other[name]) for name in drawn)
    values = [softmax[name].flatten()[0].item() for name in drawn]
    assert len(set(values)) == len(values)  # parameters of one shape differ


def test_initial_weights_have_the_documented_distributions() -> None:
    config = tiny(d_model=256, d_ff=512, qk_norm=True, init_std=0.05, attention=dict(temperature_bias=-3.0))
    weights = weights_of(config)
    for name, std in {
        "embedding.weight": 0.05,
        "blocks.1.attention.wq.weight": 0.05,
        "blocks.0.attention.wo.weight": 0.025,  # divided by sqrt(2 * 2 layers)
        "blocks.1.feed_forward.w_down.weight": 0.025,
        "blocks.0.attention.temperature.gamma.weight": 0.05,
    }.items():
        count = weights[name].numel()
        assert weights[name].std().item() == pytest.approx(std, rel=4 / (2 * count) ** 0.5)  # four standard errors
        assert abs(weights[name].mean().item()) < 4 * std / count**0.5
    assert (weights["blocks.0.attention.q_norm.weight"] == 1).all() and (weights["norm.weight"] == 1).all()
    assert (weights["blocks.0.attention.temperature.beta.bias"] == -3).all()
    assert not weights["blocks.0.attention.temperature.gamma.bias"].any()


def test_attention_stats() -> None:
    model = make(tiny("asentmax"))
    stats = attention_stats(model, tokens(), DOCUMENTS)
    assert len(stats) == 2
    for layer in stats:
        assert (layer.support_mean >= 1).all() and (layer.live_share > 0).all() and (layer.live_share <= 1).all()
        assert torch.equal(layer.temperature[:2], torch.ones(2)) and (layer.temperature[2:] > 1).all()
    with pytest.raises(ValueError, match="dense"):
        attention_stats(make(tiny("softmax")), tokens())


def test_config_round_trip() -> None:
    config = tiny("entmax", "rope", head_dim=16, attention=dict(alpha=1.2))
    assert config_from_dict(dataclasses.asdict(config)) == config
    with pytest.raises(ValueError, match=r"attention\.alfa.*another version"):
        config_from_dict({"attention": {"alfa": 1}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(n_heads=3), "n_heads: expected a divisor of d_model = 32"),
        (dict(n_kv_heads=3), "n_kv_heads: expected a divisor of n_heads = 4, got 3"),
        (dict(n_heads=1, n_kv_heads=1), "n_heads: expected an even number"),
        (dict(positions="learned"), "positions: expected one of"),
        (dict(vocab_size=0), "vocab_size is 0: expected a whole number at least 1"),
        (dict(window=0), "window is 0: expected a whole number at least 1"),
        (dict(attention=dict(alpha=2.5)), r"attention.alpha: expected a number in \[1.0001, 2\].*got 2.5"),
        (dict(attention=dict(alpha=1.0)), r"attention.alpha: expected a number in \[1.0001, 2\].*got 1.0"),
        (dict(attention=dict(alpha=2.0)), "a start strictly inside"),
        (dict(attention=dict(alpha_min=0.9)), "1.0001 <= alpha_min < alpha_max <= 2"),
        (dict(attention=dict(alpha_min=1.00001)), "1.0001 <= alpha_min < alpha_max <= 2"),
    ],
)
def test_bad_configuration_names_the_value(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**options)
