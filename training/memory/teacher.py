"""What a frozen teacher takes: weights, its forward pass, and its part of the loss."""

from dataclasses import replace

import torch

from model.config import ModelConfig
from model.transformer import Transformer
from training.memory.activations import block_activations
from training.memory.setup import FLOAT32, Setup
from training.step.teacher import cast_linears


def teacher_weights(teacher: ModelConfig, product_bytes: int) -> int:
    """Bytes, whole on each rank: the blocks' matrices in w bytes, the rest in float32."""
    with torch.device("meta"):
        model = Transformer(teacher)
    matrices = sum(p.numel() for linear in cast_linears(model) for p in linear.parameters())
    rest = sum(p.numel() for p in model.parameters()) - matrices
    return product_bytes * matrices + FLOAT32 * rest


def teacher_hidden(setup: Setup, teacher: ModelConfig) -> int:
    """Bytes of its last hidden states, which wait for the loss in float32."""
    return setup.local_tokens * FLOAT32 * teacher.d_model


def teacher_forward(setup: Setup, teacher: ModelConfig) -> float:
    """Bytes of a forward pass before the student's begins, nothing of which is kept for backward: the residual stream
    and a norm's output in float32, and either attention with its operands and wo's operand and output, or the
    feed-forward layer's three tensors of the inner width (of a tile, beside outputs of tiles and all of them)."""
    alone = replace(
        setup, network=teacher, teacher=None, zero_stage=0, float8="none", compiled=False,
        activation_checkpointing="none",
    )  # fmt: skip
    n, w, width = alone.local_tokens, alone.product_bytes, teacher.d_model
    attention = block_activations(alone)["attention"] + n * w * (teacher.n_heads * teacher.head_size + width)
    tile, outputs = (alone.mlp_tile_tokens, 2 * n * w * width) if alone.tiled else (n, 0)
    feed_forward = 3 * tile * w * teacher.feed_forward_size + outputs
    return n * width * (2 * FLOAT32 + (w if alone.casts else 0)) + max(attention, feed_forward)


def teacher_head(setup: Setup, teacher: ModelConfig) -> int:
    """Bytes of the copy of its head that the loss multiplies with; CPUs multiply in float32."""
    cast = setup.cuda and setup.product_bytes != FLOAT32
    return teacher.vocab_size * teacher.d_model * setup.product_bytes if cast else 0
