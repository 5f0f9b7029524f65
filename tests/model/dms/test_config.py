"""Sizes: what is refused, what they cost, and that a twin has as many parameters."""

from dataclasses import asdict
from typing import Any

import pytest
import torch

from common.errors import UsageError
from model.attention_stats import attention_stats
from model.config import AttentionConfig, DMSConfig, ModelConfig, config_from_dict
from model.flops import density, matmul_parameters
from model.hub.architecture import config_of
from model.inference.evicting import evicting
from model.kv_cache import KVCache
from model.policies.policy import use_policy
from model.policies.snapkv import SnapKV
from model.policies.window import SlidingWindow
from model.sequence_parallel import check_heads
from model.trained_sparse import auxiliary_loss
from model.transformer import Transformer
from tests.model.dms.looped import SIZES, network
from training.step.optim import OptimizerConfig, parameter_groups


def softmax_twin(config: ModelConfig) -> ModelConfig:
    return ModelConfig(**{**vars(config), "attention": AttentionConfig(kind="softmax")})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(window=-1), "attention.dms.window is -1: expected a whole number at least 0"),
        (dict(window=1.5), "attention.dms.window is 1.5: expected a whole number"),
        (dict(compression=1), "attention.dms.compression is 1: expected a finite number above 1"),
        (
            dict(compression=10001),
            "attention.dms.compression is 10001: expected a finite number above 1 and at",
        ),
        (dict(ramp_steps=-1), r"attention.dms.ramp_steps is -1: expected a whole number at least 0 \(0: at once\)"),
        (dict(scale=0), "attention.dms.scale is 0: expected a finite number above 0"),
        (dict(offset=float("nan")), "attention.dms.offset is nan: expected a finite number"),
        (dict(loss_weight=0), "attention.dms.loss_weight is 0: expected a finite number above 0"),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        DMSConfig(**sizes)


def test_sizes_are_of_kind_dms_alone() -> None:
    assert AttentionConfig(kind="dms").dms == DMSConfig() and AttentionConfig(kind="softmax").dms is None
    with pytest.raises(ValueError, match="^attention.dms: expected none for kind nsa, got DMSConfig"):
        AttentionConfig(kind="nsa", dms=DMSConfig())
    with pytest.raises(ValueError, match="^window: expected none for attention.kind dms, got 7"):
        ModelConfig(window=7, attention=AttentionConfig(kind="dms"))


def test_there_and_back() -> None:
    assert config_from_dict(asdict(network())) == network()
    saved = asdict(network())
    saved["attention"]["dms"]["sinks"] = 3
    with pytest.raises(ValueError, match=r"unknown model configuration keys \['attention.dms.sinks'\]"):
        config_from_dict(saved)
    older = asdict(ModelConfig())
    del older["attention"]["dms"]  # written before there was any
    assert config_from_dict(older) == ModelConfig()


def test_the_target_rises_with_the_compression() -> None:
    """CR linear in steps: 1, 2.75, 4.5, 8 after none, a quarter, half and all of them, and 8 ever after."""
    sizes = DMSConfig(compression=8, ramp_steps=700)
    for step, compression in ((0, 1), (175, 2.75), (350, 4.5), (700, 8), (10**6, 8)):
        assert sizes.target(step) == pytest.approx(1 - 1 / compression, abs=1e-12)
    assert DMSConfig(compression=4, ramp_steps=0).target(0) == 0.75


def test_the_loss_is_0_past_the_target() -> None:
    """Of three layers that evict 0.1, 0.3 and 0.5 of their tokens, 0.3 on average."""
    sizes = DMSConfig(compression=2, ramp_steps=10, loss_weight=3.0)
    config = network(sizes, n_layers=3)
    for step, expected in ((0, 0.0), (1, 0.0), (10, 3 * (0.5 - 0.3)), (99, 3 * (0.5 - 0.3))):
        shares = torch.tensor([0.1, 0.3, 0.5], dtype=torch.float64, requires_grad=True)
        loss = auxiliary_loss(config, shares.sum(), step)
        assert loss.item() == pytest.approx(expected, abs=1e-12)
        (gradient,) = torch.autograd.grad(loss, shares)
        assert torch.equal(gradient, torch.full_like(gradient, -1.0 if expected else 0.0))


def test_parameters_that_a_layer_has_besides() -> None:
    config = network(n_layers=3)
    torch.manual_seed(3)
    ours = dict(Transformer(config).named_parameters())
    torch.manual_seed(3)
    theirs = dict(Transformer(softmax_twin(config)).named_parameters())
    assert all(torch.equal(ours[name], p) for name, p in theirs.items())
    further = {name: p for name, p in ours.items() if name not in theirs}
    assert set(further) == {f"blocks.{i}.attention.sparse.eviction.weight" for i in range(3)}
    assert not any(p.any() for p in further.values())  # evict nothing at the start
    extra = 3 * SIZES.extra_parameters(24, 2)
    assert sum(p.numel() for p in further.values()) == extra == 3 * 24 * 2
    assert matmul_parameters(config) - matmul_parameters(softmax_twin(config)) == extra
    assert density(config, [5, 700]) == 1


def test_muon_leaves_rows_of_heads_to_adamw() -> None:
    model = Transformer(network())
    groups = parameter_groups(model, OptimizerConfig(name="muon"), fused=False)
    (matrices,) = (group["params"] for group in groups if group["name"] == "matrices")
    assert any(p is model.layers()[0].attention.sparse.eviction.weight for p in matrices)  # type: ignore[union-attr]


def test_the_cache_has_room_for_decisions() -> None:
    config = network(n_layers=2)
    ours, theirs = (KVCache(one, 3, 40, torch.float32, torch.device("cpu")) for one in (config, softmax_twin(config)))
    assert ours.nbytes - theirs.nbytes == 2 * 3 * 40 * 2 * 4


def test_statistics_say_what_is_read() -> None:
    """Nothing is evicted by a new model; all but a window of 5 tokens and their own where every decision is so."""
    tokens = torch.randint(61, (1, 64))
    for offset, read in ((-5.0, [t + 1 for t in range(64)]), (5.0, [min(t + 1, 6) for t in range(64)])):
        (stats,) = attention_stats(Transformer(network(DMSConfig(window=5, offset=offset))), tokens)
        # the last token is not decided on, and no query is beyond its window
        torch.testing.assert_close(stats.support_mean, torch.full((4,), sum(read) / 64))
        assert stats.pairs_read is not None and stats.alpha is None and stats.live_blocks is None
        torch.testing.assert_close(stats.pairs_read, torch.full((4,), sum(read) / (64 * 65 / 2)))


def test_what_reads_softmax_weights_refuses_it() -> None:
    model = Transformer(network())
    twin = "policies prune softmax attention, and this model's kind is 'dms': give its softmax twin"
    with pytest.raises(ValueError, match=twin), use_policy(model, SlidingWindow(4)):
        pass
    with pytest.raises(ValueError, match=twin), evicting(model, SnapKV(4)):
        pass
    with pytest.raises(UsageError, match="attention.kind dms and positions rope is none of transformers' own"):
        config_of(network(positions="rope"), 64)


def test_ranks_do_not_share_its_sequences() -> None:
    with pytest.raises(ValueError, match="^parallel.sequence_parallel is 2: expected 1, since attention.kind dms"):
        check_heads(network(), 2)
