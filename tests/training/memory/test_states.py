"""Parameters, gradients and optimizer state, and what makes room for them."""

from dataclasses import replace
from typing import Literal

import pytest

from model.config import AttentionConfig, DSAConfig, ModelConfig
from tests.training.memory.helpers import BASE, MODELS, batch, make
from training.distributed.config import BUCKET_ELEMENTS
from training.memory.activations import block_activations
from training.memory.estimate import estimate
from training.memory.setup import Setup
from training.memory.states import parameter_count
from training.step.optim import OptimizerConfig, build_optimizer


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("model", ["ssmax-rope-untied", "asentmax-nape"])
def test_states_are_exact(model: str, name: Literal["adamw", "muon"]) -> None:
    module, setup = make(MODELS[model])
    setup = replace(setup, optimizer=name)
    optimizer, _ = build_optimizer(module.model, OptimizerConfig(name=name), total_steps=10, fused=False)
    module.training_step(batch(), 0)["loss"].backward()
    optimizer.step()
    parameters = list(module.parameters())
    moments = [x for state in optimizer.state.values() for key, x in state.items() if key != "step"]
    found = estimate(setup).lasting
    assert found["parameters"].bytes == sum(p.nbytes for p in parameters)
    assert found["gradients"].bytes == sum(p.grad.nbytes for p in parameters if p.grad is not None)
    assert found["optimizer state"].bytes == sum(x.nbytes for x in moments)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_weights_have_no_gradients_and_no_state(name: Literal["adamw", "muon"]) -> None:
    attention = AttentionConfig(kind="dsa", dsa=DSAConfig(index_dim=16, stage="warmup"))
    module, setup = make(ModelConfig(**BASE, attention=attention))
    setup = replace(setup, optimizer=name)
    optimizer, _ = build_optimizer(module.model, OptimizerConfig(name=name), total_steps=10, fused=False)
    module.training_step(batch(), 0)["loss"].backward()
    optimizer.step()
    moments = [x for state in optimizer.state.values() for key, x in state.items() if key != "step"]
    found = estimate(setup).lasting
    assert found["parameters"].bytes == sum(p.nbytes for p in module.parameters())
    assert found["gradients"].bytes == sum(p.grad.nbytes for p in module.parameters() if p.grad is not None)
    assert found["gradients"].bytes < 0.2 * found["parameters"].bytes
    assert found["optimizer state"].bytes == sum(x.nbytes for x in moments)
    of_heads = {id(layer.attention.sparse.indexer.head_weight.weight) for layer in module.model.layers()}  # type: ignore
    groups = {group["name"]: {id(p) for p in group["params"]} for group in optimizer.param_groups}
    assert of_heads <= groups["matrices"]  # rows of heads, which Muon leaves to AdamW
    assert ("hidden" in groups) == (name == "muon")


def test_zero_divides_states_by_stage() -> None:
    setup = Setup(MODELS["softmax-rope"], 1024, 1024, ranks=8, precision="bf16-mixed")
    count = parameter_count(setup.network)
    one, two, three = (estimate(replace(setup, zero_stage=stage)).lasting for stage in (1, 2, 3))
    assert one["parameters"].bytes == 2 * count and one["gradients"].bytes == 4 * count
    assert one["optimizer state"].bytes == 12 * count / 8
    assert two["gradients"].bytes == 4 * count / 8 + 2 * 4 * BUCKET_ELEMENTS
    assert three["parameters"].bytes == 2 * (count / 8 + count)  # a small model is gathered whole
    offloaded = estimate(replace(setup, zero_stage=1, offload_optimizer=True))
    assert offloaded.lasting["optimizer state"].bytes == 0
    assert offloaded.host["optimizer state"].bytes == 12 * count / 8
    for stage in (0, 2):
        copied = estimate(replace(setup, zero_stage=stage, asynchronous_saves=True)).host
        assert {name: part.bytes for name, part in copied.items()} == {"copy of what is saved": 12 * count / 8}


def test_what_makes_room_makes_room() -> None:
    """On CUDA: each option lowers the peak of a long context; Triton keeps what its custom operator returns."""
    network = ModelConfig(**{**BASE, "n_layers": 8, "d_ff": 256})
    plain = Setup(network, 65536, 65536, precision="bf16-mixed", loss_backend="liger")
    steps = [
        plain, *(replace(plain, activation_checkpointing=mode) for mode in ("selective", "full", "offload")),
        replace(plain, activation_checkpointing="offload", mlp_tile_tokens=4096),
        replace(plain, activation_checkpointing="offload", mlp_tile_tokens=4096, sequence_parallel=2, ranks=2),
    ]  # fmt: skip
    totals = [estimate(setup).total for setup in steps]
    assert totals == sorted(totals, reverse=True) and totals[-1] < totals[0] / 4
    for tokens in (32768, 131_072, 262_144):
        found = block_activations(replace(plain, tokens=tokens, sequence_length=tokens))["attention"]
        operands, returned = tokens * 16 * 2 * (4 + 2 * 2), tokens * 4 * 4 + 8 * tokens
        blocks, words = tokens // 64, tokens // 2048
        bits = blocks**2
        if tokens <= 131_072:
            # also one for each key that a tile of queries sees, and for each query and tile of keys: in words of 32
            # tiles, without those of queries that see none of them
            bits += sum(64 * (i + 1) for i in range(blocks)) + sum(32 * (tokens - 2048 * w) for w in range(words))
        assert found == operands + returned + 4 * bits / 8
