"""Gradients where the engines keep them: norm, clipping, and a step that changes nothing."""

import torch

from model.config import AttentionConfig, ModelConfig
from model.transformer import Transformer
from training.distributed.engine import PlainEngine


def small_model() -> Transformer:
    torch.manual_seed(0)
    attention = AttentionConfig(kind="asentmax", learn_alpha=True)
    return Transformer(
        ModelConfig(vocab_size=64, n_layers=2, d_model=16, n_heads=2, n_kv_heads=1, d_ff=32, attention=attention)
    )


def backward(model: Transformer) -> None:
    model(torch.arange(8)[None]).square().sum().backward()


def test_norm_and_clipping_match_torch() -> None:
    model, twin = small_model(), small_model()
    for m in (model, twin):
        backward(m)
    engine = PlainEngine(model)
    norm = engine.gradient_norm()
    engine.clip_gradients(0.5, norm)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5))
    torch.testing.assert_close(engine.gradient_norm(), torch.tensor(0.5), rtol=1e-4, atol=0)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_norm_without_gradients_is_zero() -> None:
    assert PlainEngine(small_model()).gradient_norm() == 0


def test_discarded_gradients_change_nothing() -> None:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    backward(model)
    optimizer.step()
    weights = [p.detach().clone() for p in model.parameters()]
    states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()]
    backward(model)
    PlainEngine(model).discard_gradients()
    optimizer.step()
    for p, weight, state in zip(model.parameters(), weights, states, strict=True):
        assert torch.equal(p, weight)
        assert all(torch.equal(optimizer.state[p][k], v) for k, v in state.items())
