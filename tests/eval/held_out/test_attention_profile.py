"""Which queries are sampled, and what dense attention has by construction."""

import numpy as np
import pytest
import torch

from eval.common.scoring import Runtime
from eval.held_out.attention_profile import profile_document, sample_queries
from eval.held_out.config import EvalConfig
from model.config import AttentionConfig, ModelConfig
from model.transformer import Transformer
from tests.eval.conftest import ListStore

RUNTIME = Runtime(torch.device("cpu"), None, 512)


def test_one_query_of_each_stretch() -> None:
    for seed in range(20):
        queries = sample_queries(1000, 8, [seed])
        assert (queries // 125).tolist() == list(range(8))
    assert sample_queries(1000, 8, [1]).tolist() == sample_queries(1000, 8, [1]).tolist()
    assert sample_queries(1000, 8, [1]).tolist() != sample_queries(1000, 8, [2]).tolist()
    assert sample_queries(5, 8, [0]).tolist() == [0, 1, 2, 3, 4] == sample_queries(5, 5, [0]).tolist()


def test_sampled_queries_are_unbiased() -> None:
    """Each of 30 positions in 4 stretches of 7.5 is drawn with probability 4 / 30."""
    draws = np.zeros(30)
    for seed in range(3000):
        draws[sample_queries(30, 4, [seed])] += 1
    # six standard deviations of a share of 3000 trials
    assert np.abs(draws / 3000 - 4 / 30).max() < 6 * (4 / 30 / 3000) ** 0.5


@pytest.mark.parametrize(("window", "support"), [(None, 4.5), (3, (1 + 2 + 6 * 3) / 8)])
def test_softmax_has_weight_on_all_it_sees(window: int | None, support: float) -> None:
    network = ModelConfig(
        vocab_size=258, n_layers=2, d_model=16, n_heads=2, n_kv_heads=1, d_ff=16, window=window,
        attention=AttentionConfig(kind="softmax"),
    )  # fmt: skip
    layers = profile_document(Transformer(network), ListStore(["some text"]), 0, 2, 4, EvalConfig(), RUNTIME)
    assert [(one.multiple, one.layer) for one in layers] == [(2, 0), (2, 1)]
    for one in layers:
        assert one.support == [support] * 2 and one.live_share == [1.0, 1.0] and one.alpha is one.temperature is None
        assert all(0 < share <= 1 for share in one.relative_entropy + one.sink_share)
