"""Sizes: what is refused, what they cost, and that a twin has as many parameters."""

from dataclasses import asdict
from typing import Any

import pytest
import torch

from common.errors import UsageError
from model.attention_stats import attention_stats
from model.config import AttentionConfig, HierarchicalConfig, ModelConfig, config_from_dict
from model.hub.architecture import config_of
from model.inference.evicting import evicting
from model.layers import AdaptiveTemperature
from model.loading import model_fingerprint
from model.policies.policy import use_policy
from model.policies.snapkv import SnapKV
from model.policies.window import SlidingWindow
from model.sequence_parallel import check_heads
from model.transformer import Transformer
from tests.model.hierarchical.looped import network


def softmax_twin(config: ModelConfig) -> ModelConfig:
    return ModelConfig(**{**vars(config), "attention": AttentionConfig(kind="softmax")})


@pytest.mark.parametrize("block", [0, -1, 1.5, 2**20 + 1])
def test_blocks_that_are_none(block: Any) -> None:
    with pytest.raises(ValueError, match=f"^attention.hierarchical.block is {block}: expected a whole number"):
        HierarchicalConfig(block=block)


def test_sizes_are_of_kind_hierarchical_alone() -> None:
    assert AttentionConfig(kind="hierarchical").hierarchical == HierarchicalConfig()
    assert AttentionConfig(kind="softmax").hierarchical is None is AttentionConfig(kind="hierarchical").nsa
    with pytest.raises(ValueError, match="^attention.hierarchical: expected none for kind nsa, got HierarchicalConfig"):
        AttentionConfig(kind="nsa", hierarchical=HierarchicalConfig())
    with pytest.raises(ValueError, match="^window: expected none for attention.kind hierarchical, got 7"):
        ModelConfig(window=7, attention=AttentionConfig(kind="hierarchical"))


def test_alphas_are_checked_as_entmax_s() -> None:
    with pytest.raises(ValueError, match="^attention.alpha: expected a start strictly inside"):
        AttentionConfig(kind="hierarchical", alpha=2.0)
    assert AttentionConfig(kind="hierarchical", anneal_steps=5).annealed(1) == 0.2
    attention = AttentionConfig(kind="hierarchical")
    assert attention.has_alpha and attention.is_trained_sparse and not attention.is_entmax and not attention.is_softmax


def test_there_and_back() -> None:
    for config in (network(), ModelConfig(attention=AttentionConfig(kind="softmax"))):
        assert config_from_dict(asdict(config)) == config
    saved = asdict(network())
    saved["attention"]["hierarchical"]["size"] = 3
    with pytest.raises(ValueError, match=r"unknown model configuration keys \['attention.hierarchical.size'\]"):
        config_from_dict(saved)
    older = asdict(ModelConfig())
    del older["attention"]["hierarchical"]  # written before there was any
    assert config_from_dict(older) == ModelConfig()


def test_fingerprints_are_of_the_sizes() -> None:
    def fingerprint(block: int) -> str:
        torch.manual_seed(0)
        return model_fingerprint(Transformer(network(block)))

    assert fingerprint(8) == fingerprint(8) != fingerprint(16)


@pytest.mark.parametrize("scaled", [False, True])
def test_parameters_are_softmaxs_and_few_more(scaled: bool) -> None:
    config = network(adaptive_temperature=scaled, n_layers=3)
    torch.manual_seed(3)
    ours = dict(Transformer(config).named_parameters())
    torch.manual_seed(3)
    theirs = dict(Transformer(softmax_twin(config)).named_parameters())
    assert all(torch.equal(ours[name], p) for name, p in theirs.items())
    further = sum(p.numel() for name, p in ours.items() if name not in theirs)
    assert further == 3 * 4 + scaled * 3 * 2 * 4 * (24 + 1)
    assert all("alpha_raw" in name or ".temperature." in name for name in ours.keys() - theirs.keys())


def test_adaptive_temperature_scales_queries() -> None:
    """So that it scales the scores of blocks and those of tokens."""
    layer = Transformer(network(adaptive_temperature=True)).layers()[0].attention
    assert isinstance(layer.temperature, AdaptiveTemperature)
    assert Transformer(network()).layers()[0].attention.temperature is None


def test_annealed_alpha_is_the_one_that_attends() -> None:
    """Near 1 every block has weight; at 2 few have."""
    attention = AttentionConfig(kind="hierarchical", alpha=2, learn_alpha=False, anneal_steps=10, anneal_from=1.01)
    attention.hierarchical = HierarchicalConfig(block=4)
    config = ModelConfig(**{**vars(network(init_std=0.5)), "attention": attention})
    torch.manual_seed(0)
    model, tokens = Transformer(config), torch.randint(61, (1, 64))
    model.set_step(10)
    late = attention_stats(model, tokens)[0]
    model.set_step(0)
    early = attention_stats(model, tokens)[0]
    assert early.live_blocks is not None and late.live_blocks is not None
    assert (early.live_blocks > 2 * late.live_blocks).all() and (late.live_blocks >= 1).all()
    assert early.pairs_read is not None and late.pairs_read is not None
    assert (early.pairs_read > late.pairs_read).all() and (early.pairs_read <= 1).all()
    assert torch.equal(early.alpha, torch.full((4,), 1.01)) and torch.equal(late.alpha, torch.full((4,), 2.0))


@pytest.mark.parametrize("block", [1, 7, 64])
def test_summaries_read(block: int) -> None:
    """Counted query by query."""
    lengths = [0, 1, 6, 7, 8, 63, 64, 65, 700]
    expected = [sum(t // block + 1 for t in range(n)) for n in lengths]
    assert [HierarchicalConfig(block).summaries_read([n]) for n in lengths] == expected
    assert HierarchicalConfig(block).summaries_read(lengths) == sum(expected)


def test_what_reads_softmax_weights_refuses_it() -> None:
    model = Transformer(network())
    twin = "policies prune softmax attention, and this model's kind is 'hierarchical': give its softmax twin"
    with pytest.raises(ValueError, match=twin), use_policy(model, SlidingWindow(4)):
        pass
    with pytest.raises(ValueError, match=twin), evicting(model, SnapKV(4)):
        pass
    with pytest.raises(UsageError, match="attention.kind hierarchical and positions rope is none of transformers' own"):
        config_of(network(positions="rope"), 64)


def test_ranks_do_not_share_its_sequences() -> None:
    check_heads(network(), 1)
    with pytest.raises(ValueError, match="^parallel.sequence_parallel is 2: expected 1, since attention.kind hierarch"):
        check_heads(network(), 2)
