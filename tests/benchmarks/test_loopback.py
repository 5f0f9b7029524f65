"""One rank by itself: the shapes of a real group, what it sent in place of what it would receive."""

from dataclasses import replace

import pytest
import torch

from benchmarks.loopback import first_rank
from benchmarks.train_speed import network, random_batch
from model.sequence_parallel import HeadExchange
from training.module import LanguageModule
from training.step.optim import OptimizerConfig


@pytest.mark.parametrize("size", [2, 4, 8])
def test_it_attends_with_its_share_of_heads_over_all_tokens(size: int) -> None:
    config = network("1b", "softmax")  # 32 query heads, 4 KV heads
    shards = first_rank(config, size, 16 * size)
    assert shards is not None
    exchange = HeadExchange(shards, config.n_heads, config.n_kv_heads)
    sent = [torch.randn(1, heads, 16, 8) for heads in (config.n_heads, config.n_kv_heads, config.n_kv_heads)]
    q, k, v = exchange.to_heads(*sent)
    kv_heads = max(1, config.n_kv_heads // size)
    assert q.shape == (1, config.n_heads // size, 16 * size, 8) and k.shape == v.shape == (1, kv_heads, 16 * size, 8)
    assert torch.equal(exchange.to_tokens(q), sent[0])  # what came back came from here


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["softmax", "asentmax"])
def test_a_rank_by_itself_computes_its_share(kind: str, compiled: bool) -> None:
    config = replace(network("smoke", kind), n_layers=1)
    module = LanguageModule(config, OptimizerConfig(), loss_backend="chunked", compile=compiled)
    batch = random_batch(config, tokens=96, lengths=[96], length=96)
    whole = module.on_before_batch_transfer(batch, 0)["flops"]
    module.shards = first_rank(config, 2, 96)
    prepared = module.on_before_batch_transfer(batch, 0)
    assert prepared["tokens"].shape == (1, 48) and prepared["flops"] == whole / 2
    loss = module.training_step(prepared, 0)["loss"]
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


def test_one_rank_shares_with_nobody_and_what_cannot_be_shared_is_named() -> None:
    config = network("1b", "softmax")
    assert first_rank(config, 1, 7) is None
    with pytest.raises(ValueError, match="n_heads is 32: expected a multiple"):
        first_rank(config, 3, 96)
    with pytest.raises(ValueError, match="is 97 tokens: expected a multiple"):
        first_rank(config, 2, 97)
