"""Sizes: what is refused, what they cost, and that a twin has as many parameters."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from model.attention_stats import attention_stats
from model.config import AttentionConfig, ModelConfig, NSAConfig, config_from_dict
from model.inference.evicting import evicting
from model.policies.policy import use_policy
from model.policies.snapkv import SnapKV
from model.policies.window import SlidingWindow
from model.sequence_parallel import check_heads
from model.trained_sparse import KINDS
from model.transformer import Transformer
from tests.model.nsa.looped import SIZES, network


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(compress_stride=0), "attention.nsa.compress_stride is 0: expected a whole number at least 1"),
        (dict(compress_length=24), "attention.nsa.compress_length is 24: expected a multiple of compress_stride = 16"),
        (dict(select_block=40), "attention.nsa.select_block is 40: expected a multiple of compress_stride = 16"),
        (dict(select_count=2), "attention.nsa.select_count is 2: expected more than select_local = 2"),
        (dict(select_local=0), "attention.nsa.select_local is 0: expected a whole number at least 1"),
        (dict(window=1.5), "attention.nsa.window is 1.5: expected a whole number"),
        (dict(compress_hidden=0), "attention.nsa.compress_hidden is 0: .* null for the head dim"),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        NSAConfig(**sizes)


def test_sizes_are_of_kind_nsa_alone() -> None:
    assert AttentionConfig(kind="nsa").nsa == NSAConfig() and AttentionConfig(kind="softmax").nsa is None
    with pytest.raises(ValueError, match="^attention.nsa: expected none for kind softmax, got NSAConfig"):
        AttentionConfig(kind="softmax", nsa=NSAConfig())
    with pytest.raises(
        ValueError, match="^window: expected none for attention.kind nsa: set attention.nsa.window, got 7"
    ):
        ModelConfig(window=7, attention=AttentionConfig(kind="nsa"))


def test_no_feed_forward_layer_is_left() -> None:
    attention = AttentionConfig(kind="nsa", nsa=NSAConfig(equal_parameters=True))
    with pytest.raises(ValueError, match="^attention.nsa.equal_parameters: expected false: .* of d_ff = 300 have"):
        ModelConfig(d_ff=300, attention=attention)


def test_there_and_back() -> None:
    for config in (network(), ModelConfig(attention=AttentionConfig(kind="softmax"))):
        assert config_from_dict(asdict(config)) == config
    saved = asdict(network())
    saved["attention"]["nsa"]["stride"] = 3
    with pytest.raises(ValueError, match=r"unknown model configuration keys \['attention.nsa.stride'\]"):
        config_from_dict(saved)
    older = asdict(ModelConfig())
    del older["attention"]["nsa"]  # written before there was any
    assert config_from_dict(older) == ModelConfig()


@pytest.mark.parametrize("bias", [False, True])
def test_parameters_that_a_layer_has_besides(bias: bool) -> None:
    config = network(qkv_bias=bias, n_layers=3)
    softmax = ModelConfig(**{**vars(config), "attention": AttentionConfig(kind="softmax")})
    with torch.device("meta"):
        ours, theirs = (sum(p.numel() for p in Transformer(one).parameters()) for one in (config, softmax))
    assert ours - theirs == 3 * SIZES.extra_parameters(24, 4, 2, 8, bias)


def test_weights_that_both_have_are_the_same() -> None:
    """But for the projections of keys and values, which are of three branches, at the same seed."""
    config = network()
    softmax = ModelConfig(**{**vars(config), "attention": AttentionConfig(kind="softmax")})
    found = []
    for one in (config, softmax):
        torch.manual_seed(3)
        found.append(dict(Transformer(one).named_parameters()))
    ours, theirs = found
    for name, p in theirs.items():
        if not name.endswith(("wk.weight", "wv.weight")):
            assert torch.equal(ours[name], p), name
    assert all((p != 0).any() for name, p in ours.items() if not name.endswith("gate.bias"))
    assert not ours["blocks.0.attention.sparse.gate.bias"].any()  # gates start near one half


@pytest.mark.parametrize(
    "sizes", [SIZES, NSAConfig(), NSAConfig(4, 4, None, 4, 2, 1, 1)], ids=["small", "paper", "equal"]
)
def test_keys_read(sizes: NSAConfig) -> None:
    """Counted query by query."""
    read, lengths = [0], 1300
    for t in range(lengths):
        compressed = max(0, (t + 1 - sizes.compress_length) // sizes.compress_stride + 1)
        blocks = min(sizes.select_count, t // sizes.select_block + 1)
        selected = (blocks - 1) * sizes.select_block + t % sizes.select_block + 1
        read.append(read[-1] + compressed + selected + min(t + 1, sizes.window))
    counts = [0, 1, 5, 31, 32, 33, 64, 700, 1024, 1025, 1300]
    assert sizes.keys_read(counts).tolist() == [read[n] for n in counts]
    assert sizes.density([700, 1300]) == (read[700] + read[1300]) / (700 * 701 / 2 + 1300 * 1301 / 2)


def test_what_reads_softmax_weights_refuses_it() -> None:
    model = Transformer(network())
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    twin = "policies prune softmax attention, and this model's kind is 'nsa': give its softmax twin"
    with pytest.raises(ValueError, match=twin), use_policy(model, SlidingWindow(4)):
        pass
    with pytest.raises(ValueError, match=twin), evicting(model, SnapKV(4)):
        pass
    with pytest.raises(ValueError, match="attention kind 'nsa' chooses keys before it weighs them: it has no support"):
        attention_stats(model, tokens)


def test_ranks_do_not_share_its_sequences() -> None:
    check_heads(network(), 1)
    with pytest.raises(ValueError, match="^parallel.sequence_parallel is 2: expected 1, since attention.kind nsa"):
        check_heads(network(), 2)


def test_the_docs_have_every_trained_kind_with_its_config() -> None:
    root = Path(__file__).parents[3]
    trained = (root / "docs/sparse_attention.md").read_text().split("\n## Trained\n")[1]
    rows = dict(re.findall(r"^\| (\w+) \|.*\(\.\./(configs/attention/\w+\.yaml)\)", trained, flags=re.M))
    assert rows == {kind: f"configs/attention/{kind}.yaml" for kind in KINDS}
    assert all(f"kind: {kind}\n" in (root / path).read_text() for kind, path in rows.items())
    assert all(f"{100 * NSAConfig().density([length]):.0f} %" in trained for length in (512, 8192, 32768))
