"""Parameters, gradients and optimizer state, and what makes room for them."""

from dataclasses import replace

import torch

from model.config import ModelConfig
from tests.training.memory.helpers import BASE, MODELS, batch, make
from training.distributed.config import BUCKET_ELEMENTS
from training.memory.activations import block_activations
from training.memory.estimate import estimate
from training.memory.setup import Setup
from training.memory.states import parameter_count
from training.step.optim import OptimizerConfig, parameter_groups


def test_states_are_exact() -> None:
    module, setup = make(MODELS["ssmax-rope-untied"])
    optimizer = torch.optim.AdamW(parameter_groups(module.model, OptimizerConfig(), fused=False))
    module.training_step(batch(), 0)["loss"].backward()
    optimizer.step()
    parameters = list(module.parameters())
    moments = [x for state in optimizer.state.values() for key, x in state.items() if key != "step"]
    found = estimate(setup).lasting
    assert found["parameters"].bytes == sum(p.nbytes for p in parameters)
    assert found["gradients"].bytes == sum(p.grad.nbytes for p in parameters if p.grad is not None)
    assert found["optimizer state"].bytes == sum(x.nbytes for x in moments)


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
    operands = 65536 * 16 * 2 * (4 + 2 * 2)
    returned = 65536 * 4 * 4 + 8 * 65536
    assert block_activations(plain)["attention"] == operands + returned + 4 * 65536**2 / 64**2 / 8
    # at 32,768 tokens also a bit for each key that a tile of queries sees, and for each query and tile of keys: in
    # words of 32 tiles, without those of queries that see none of them
    bits = 32768**2 // 64**2 + sum(64 * (i + 1) for i in range(512)) + sum(32 * (32768 - 2048 * w) for w in range(16))
    shorter = (operands + returned) / 2 + 4 * bits / 8
    assert block_activations(replace(plain, tokens=32768, sequence_length=32768))["attention"] == shorter
