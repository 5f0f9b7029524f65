"""Entropy, sink and sampled weights against dense attention that is written out here, for every kind of attention."""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

import model.attention_weights
from kernels.alpha_entmax.reference import entmax_reference
from model.attention import Attention, make_metadata
from model.attention_weights import layer_profiles
from model.config import (
    TRAINED_SPARSE,
    AttentionConfig,
    AttentionKind,
    DMSConfig,
    HierarchicalConfig,
    ModelConfig,
)
from model.dms.attention import DynamicMemorySparsification
from model.transformer import Transformer
from tests.model.hierarchical.looped import block_weights

N_TOKENS = 70

KINDS = [kind for kind in get_args(AttentionKind) if AttentionConfig(kind=kind).has_profile]


def build(kind: AttentionKind, positions: str = "nape", window: int | None = None, **attention: float) -> Transformer:
    torch.manual_seed(0)
    sizes = {
        "hierarchical": {"hierarchical": HierarchicalConfig(block=8)},
        "dms": {"dms": DMSConfig(window=5, offset=1.0)},
    }.get(kind, {})
    config = ModelConfig(
        vocab_size=50, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, init_std=0.3, positions=positions,  # type: ignore[arg-type]
        window=window, attention=AttentionConfig(kind=kind, **sizes, **attention),  # type: ignore[arg-type]
    )  # fmt: skip
    model = Transformer(config).double()
    for block in model.layers():
        if block.attention.alpha is not None and block.attention.alpha.alpha_raw is not None:
            torch.nn.init.normal_(block.attention.alpha.alpha_raw)
        if isinstance(block.attention.sparse, DynamicMemorySparsification):
            torch.nn.init.normal_(block.attention.sparse.eviction.weight)
    return model


def dense_weights(attention: Attention, x: Tensor) -> Tensor:
    """(H, T, T), from the layer's parameters and the formulas of its parts."""
    config, n = attention.config, x.shape[1]
    heads, width = config.n_heads, config.head_size
    q, k = ((x[0] @ w.weight.T).view(n, -1, width).transpose(0, 1) for w in (attention.wq, attention.wk))
    if config.positions == "rope":
        angle = torch.arange(n)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
        turn = torch.polar(torch.ones_like(angle), angle)

        def rotated(y: Tensor) -> Tensor:
            z = torch.complex(y[..., : width // 2], y[..., width // 2 :]) * turn
            return torch.cat([z.real, z.imag], -1)

        q, k = rotated(q), rotated(k)
    metadata = make_metadata(config, n, None, None, x.device)
    if attention.temperature is not None:
        scaled = attention.temperature(x, metadata.log_position)[0].double()  # tested in test_transformer
        q = q * torch.cat([torch.ones(heads - len(scaled), n), scaled])[..., None]
    scores = q @ k.repeat_interleave(heads // config.n_kv_heads, 0).mT / width**0.5
    distance = torch.arange(n)[:, None] - torch.arange(n)
    if config.positions == "nape":
        slopes = torch.tensor([1 / (h + 1) if h < heads // 2 else 0.0 for h in range(heads)])
        scores = scores - slopes[:, None, None] * distance
    hidden = (distance < 0) | (distance >= (config.window or n))
    scores = scores.masked_fill(hidden, -torch.inf)
    if config.attention.dms is not None:
        z = x[0] @ attention.sparse.eviction.weight.T * 100 + 1  # [T, G]; the token behind a key decides on it
        gone = torch.cat([z[1:] > 0, torch.zeros(1, config.n_kv_heads, dtype=torch.bool)]).T.repeat_interleave(2, 0)
        return scores.masked_fill(gone[:, None] & (distance > 5), -torch.inf).softmax(-1)
    if attention.alpha is None:
        return scores.softmax(-1)
    if config.attention.hierarchical is not None:
        return (scores + _log_p(attention, q, k, n)).softmax(-1)
    return entmax_reference(scores, attention.alpha(x.device).double()[:, None, None])


def _log_p(attention: Attention, q: Tensor, k: Tensor, n: int) -> Tensor:
    """(H, T, T), of each key's block."""
    assert attention.alpha is not None
    found = torch.full((len(q), n, n), -torch.inf, dtype=torch.float64)
    alibi = [1.0, 0.5, 0.0, 0.0] if attention.config.positions == "nape" else [0.0] * 4
    for h, alpha in enumerate(attention.alpha(q.device).tolist()):
        for t in range(n):
            p = torch.tensor(block_weights(q[h, t], k[h // 2, : t + 1], alpha, alibi[h], 8), dtype=torch.float64)
            found[h, t, : t + 1] = p.log().repeat_interleave(8)[: t + 1]
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("positions", "window"), [("nape", None), ("rope", None), ("nope", 9)])
def test_measures_are_those_of_dense_attention(
    kind: AttentionKind, positions: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind in TRAINED_SPARSE:
        window = None
    monkeypatch.setattr(model.attention_weights, "WEIGHTS_AT_ONCE", 3 * 4 * N_TOKENS)  # three rows at a time
    decoder = build(kind, positions, window)
    tokens = torch.randint(50, (1, N_TOKENS))
    queries = torch.tensor([0, 1, 2, 5, 13, 40, 68, 69])
    shapes, stats = layer_profiles(decoder, tokens, queries, 3)
    assert len(shapes) == 2 and len(stats) == (0 if kind in ("softmax", "ssmax") else 2)
    x = decoder.embedding(tokens)
    for layer, block in enumerate(decoder.layers()):
        weights = dense_weights(block.attention, block.attention_norm(x))
        entropy = -(weights * weights.clamp(min=1e-300).log()).sum(-1)  # [H, T]
        visible = torch.arange(1, N_TOKENS + 1).clamp(max=window or N_TOKENS)
        relative = entropy / visible.double().log().clamp(min=1e-300)
        # rotary tables, temperatures and alphas are float32: 1e-7 each, times scores of at most about 100
        for name, expected in (
            ("entropy", entropy),
            ("relative_entropy", relative),
            ("sink_share", weights[..., :3].sum(-1)),
        ):
            torch.testing.assert_close(
                getattr(shapes[layer], name).double(), expected[:, queries].mean(1), atol=1e-4, rtol=1e-4, msg=name
            )
        if stats:
            torch.testing.assert_close(
                stats[layer].support_mean.double(), (weights > 0).sum(-1).double().mean(1), atol=0.1, rtol=0
            )
        if kind == "dms":
            read, seen = (weights > 0).sum((1, 2)).double(), torch.nn.functional.pad(weights > 0, (0, 58, 0, 58))
            torch.testing.assert_close(stats[layer].pairs_read.double(), read / (N_TOKENS * (N_TOKENS + 1) / 2))
            tiles = seen.unflatten(1, (2, 64)).unflatten(3, (2, 64)).any(4).any(2).sum((1, 2))
            torch.testing.assert_close(stats[layer].live_share, tiles / 3)
            assert 0.2 < stats[layer].pairs_read.mean() < 0.9
        if kind == "hierarchical":
            read = (weights > 0).sum((1, 2)).double()
            live = torch.nn.functional.pad(weights > 0, (0, 2)).unflatten(2, (9, 8)).any(3).sum(2).double().mean(1)
            for found, expected in (
                (stats[layer].pairs_read, read / (N_TOKENS * (N_TOKENS + 1) / 2)),
                (stats[layer].live_blocks, live),
            ):
                torch.testing.assert_close(found.double(), expected, atol=2e-3, rtol=1e-2)
            assert 0.05 < stats[layer].pairs_read.mean() < 0.95 and (stats[layer].live_share == 1).any()
        x = block(x, make_metadata(decoder.config, N_TOKENS, None, None, x.device))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dms"])
def test_equal_scores_have_the_entropy_of_all_visible_keys(kind: AttentionKind) -> None:
    decoder = build(kind, "nope")
    for block in decoder.layers():
        torch.nn.init.zeros_(block.attention.wk.weight)
    queries = torch.arange(N_TOKENS)
    shapes, _ = layer_profiles(decoder, torch.randint(50, (1, N_TOKENS)), queries, 4)
    visible = [1 + int(position) for position in queries]
    for shape in shapes:
        expected = sum(math.log(n) for n in visible) / N_TOKENS
        torch.testing.assert_close(shape.entropy, torch.full((4,), expected), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(shape.relative_entropy, torch.full((4,), 1 - 1 / N_TOKENS), atol=1e-5, rtol=0)
        sink = sum(min(4, n) / n for n in visible) / N_TOKENS
        torch.testing.assert_close(shape.sink_share, torch.full((4,), sink), atol=1e-5, rtol=1e-5)


def test_three_branches_have_no_weights_of_one_kind() -> None:
    with pytest.raises(ValueError, match="'nsa' chooses keys before it weighs them: it has no profile"):
        layer_profiles(build("nsa"), torch.zeros(1, 8, dtype=torch.int64), torch.arange(8), 4)


def test_annealed_alpha_is_the_one_of_the_step() -> None:
    decoder = build("entmax", anneal_steps=10, anneal_from=1.01)
    tokens, queries = torch.randint(50, (1, N_TOKENS)), torch.arange(8, N_TOKENS)
    at_end = layer_profiles(decoder, tokens, queries, 4)[0][0].entropy
    decoder.set_step(0)
    at_start = layer_profiles(decoder, tokens, queries, 4)[0][0].entropy
    assert (at_start > at_end).all()  # nearly softmax


@pytest.mark.parametrize(("shape", "query", "message"), [((2, 8), 0, "one document"), ((1, 8), 8, "0 ... 7, got")])
def test_what_cannot_be_measured_is_refused(shape: tuple[int, int], query: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_profiles(build("softmax"), torch.zeros(shape, dtype=torch.int64), torch.tensor([query]), 4)
