"""Sizes: what is refused, what they cost, and that a twin has as many parameters."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from model.attention_stats import attention_stats
from model.config import AttentionConfig, DSAConfig, ModelConfig, NSAConfig, config_from_dict
from model.flops import density, matmul_parameters, sequence_cost
from model.inference.evicting import evicting
from model.kv_cache import KVCache
from model.policies.policy import use_policy
from model.policies.snapkv import SnapKV
from model.policies.window import SlidingWindow
from model.sequence_parallel import check_heads
from model.sparse_attention import freeze_dense
from model.transformer import Transformer
from tests.model.dsa.looped import SIZES, WARMUP, network


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(index_heads=0), "attention.dsa.index_heads is 0: expected a whole number at least 1"),
        (dict(index_dim=4), "attention.dsa.index_dim is 4: expected a whole number at least 8"),
        (dict(index_dim=10), "attention.dsa.index_dim is 10: expected a multiple of 4"),
        (dict(select_tokens=1.5), "attention.dsa.select_tokens is 1.5: expected a whole number"),
        (dict(stage="dense"), r"attention.dsa.stage is 'dense': expected one of \('warmup', 'sparse'\)"),
        (dict(loss_weight=0), "attention.dsa.loss_weight is 0: expected a finite number above 0"),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        DSAConfig(**sizes)


def test_sizes_are_of_kind_dsa_alone() -> None:
    assert AttentionConfig(kind="dsa").dsa == DSAConfig() and AttentionConfig(kind="softmax").dsa is None
    with pytest.raises(ValueError, match="^attention.dsa: expected none for kind nsa, got DSAConfig"):
        AttentionConfig(kind="nsa", dsa=DSAConfig())
    with pytest.raises(ValueError, match="^attention.nsa: expected none for kind dsa, got NSAConfig"):
        AttentionConfig(kind="dsa", nsa=NSAConfig())
    with pytest.raises(ValueError, match="^window: expected none for attention.kind dsa, got 7"):
        ModelConfig(window=7, attention=AttentionConfig(kind="dsa"))


def test_no_feed_forward_layer_is_left() -> None:
    attention = AttentionConfig(kind="dsa", dsa=DSAConfig(equal_parameters=True))
    with pytest.raises(ValueError, match="^attention.dsa.equal_parameters: expected false: .* of d_ff = 50 have"):
        ModelConfig(d_ff=50, attention=attention)


def test_there_and_back() -> None:
    assert config_from_dict(asdict(network())) == network()
    saved = asdict(network())
    saved["attention"]["dsa"]["index_rank"] = 3
    with pytest.raises(ValueError, match=r"unknown model configuration keys \['attention.dsa.index_rank'\]"):
        config_from_dict(saved)
    older = asdict(ModelConfig())
    del older["attention"]["dsa"]  # written before there was any
    assert config_from_dict(older) == ModelConfig()


def softmax_twin(config: ModelConfig) -> ModelConfig:
    return ModelConfig(**{**vars(config), "attention": AttentionConfig(kind="softmax")})


def test_parameters_that_a_layer_has_besides() -> None:
    config = network(n_layers=3)
    with torch.device("meta"):
        ours, theirs = (sum(p.numel() for p in Transformer(one).parameters()) for one in (config, softmax_twin(config)))
    assert ours - theirs == 3 * SIZES.extra_parameters(24)
    assert matmul_parameters(config) - matmul_parameters(softmax_twin(config)) == 3 * 24 * (3 * 8 + 8 + 3)


def test_weights_that_both_have_are_the_same() -> None:
    config = network()
    found = []
    for one in (config, softmax_twin(config)):
        torch.manual_seed(3)
        found.append(dict(Transformer(one).named_parameters()))
    ours, theirs = found
    assert all(torch.equal(ours[name], p) for name, p in theirs.items())
    indexer = {name.split(".indexer.")[1]: p for name, p in ours.items() if name not in theirs}
    assert set(indexer) == {"wq.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "head_weight.weight"}
    assert (indexer["k_norm.weight"] == 1).all() and (indexer["k_norm.bias"] == 0).all()
    assert all((indexer[name] != 0).all() for name in ("wq.weight", "wk.weight", "head_weight.weight"))


def test_density() -> None:
    """Counted query by query."""
    config, visible = network(), 0
    products = 3 * 8 / (2 * 4 * 8)
    chosen = 0
    for length in (5, 700):
        visible += sum(t + 1 for t in range(length))
        chosen += sum(min(t + 1, SIZES.select_tokens) for t in range(length))
    assert density(config, [5, 700]) == chosen / visible + products
    assert density(network(WARMUP), [5, 700]) == 1 + products
    attention = (sequence_cost(one, [700]) - 6 * matmul_parameters(one) * 700 for one in (config, softmax_twin(config)))
    assert next(attention) == pytest.approx(density(config, [700]) * next(attention), rel=1e-9)


def test_densities_of_the_docs() -> None:
    page = (Path(__file__).parents[3] / "docs/sparse_attention.md").read_text()
    products = DSAConfig(stage="warmup").density([8192], 8, 64) - 1
    found = [DSAConfig().density([length], 8, 64) - products for length in (8192, 32768)]
    assert f"{100 * products:.1f} % of those of dense attention" in page
    assert f"attend to {100 * found[0]:.0f} % of the visible keys" in page and f"to {100 * found[1]:.0f} % at" in page


def test_what_reads_softmax_weights_refuses_it() -> None:
    model = Transformer(network())
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    twin = "policies prune softmax attention, and this model's kind is 'dsa': give its softmax twin"
    with pytest.raises(ValueError, match=twin), use_policy(model, SlidingWindow(4)):
        pass
    with pytest.raises(ValueError, match=twin), evicting(model, SnapKV(4)):
        pass
    with pytest.raises(ValueError, match="attention kind 'dsa' chooses keys before it weighs them: it has no support"):
        attention_stats(model, tokens)


def test_ranks_do_not_share_its_sequences() -> None:
    with pytest.raises(ValueError, match="^parallel.sequence_parallel is 2: expected 1, since attention.kind dsa"):
        check_heads(network(), 2)


def test_the_cache_has_room_for_index_keys() -> None:
    config = network(n_layers=2)
    ours, theirs = (KVCache(one, 3, 40, torch.float32, torch.device("cpu")) for one in (config, softmax_twin(config)))
    assert ours.nbytes - theirs.nbytes == 2 * 3 * 40 * 8 * 4


def test_index_keys_go_where_their_row_goes() -> None:
    """Into larger memory, and with a copied row."""
    config = network()
    cache = KVCache(config, 2, 64, torch.float32, torch.device("cpu"), reserved=4)
    extension, (layer,) = cache.open(1, 4)
    keys = torch.randn(1, 4, 8)
    layer.append(torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8))
    assert torch.equal(layer.append_extra(keys), keys)
    cache.advance(1, 4)
    cache.copy_row(0, 1)
    _, (layer,) = cache.open(2, 3)
    assert cache.slots >= 7 and extension.keys.stop == 4
    assert torch.equal(layer.extra[:, 0, :4], keys.expand(2, -1, -1))


def test_freezing_leaves_the_indexer() -> None:
    model = Transformer(network(WARMUP))
    freeze_dense(model)
    assert all(p.requires_grad == (".indexer." in name) for name, p in model.named_parameters())
    assert [replace(WARMUP, freeze=False).freezes, WARMUP.freezes, SIZES.freezes] == [False, True, False]
