"""Parameters, gradients and optimizer state."""

from dataclasses import dataclass

import torch
from torch import nn

from model.config import ModelConfig
from model.sparse_attention import freeze_dense
from model.transformer import Block, Transformer
from training.distributed.checkpoint_state import SAVED_BYTES
from training.distributed.config import BUCKET_ELEMENTS
from training.memory.setup import FLOAT32, Setup
from training.step.float8 import Float8, fits
from training.step.muon import is_muon
from training.step.optim import OptimizerConfig, parameter_groups


@dataclass(frozen=True)
class Part:
    """Bytes, and where they come from."""

    bytes: float
    formula: str


def parameter_count(network: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(network).parameters())


def trained_count(network: ModelConfig) -> int:
    """Those that have gradients."""
    with torch.device("meta"):
        model = Transformer(network)
    if network.attention.freezes:
        freeze_dense(model)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def muon_elements(network: ModelConfig) -> int:
    """Elements of all matrices that Muon steps."""
    with torch.device("meta"):
        model = Transformer(network)
    if network.attention.freezes:
        freeze_dense(model)
    groups = parameter_groups(model, OptimizerConfig(name="muon"), fused=False)
    return sum(p.numel() for group in groups if is_muon(group) for p in group["params"])


def block_matrices(network: ModelConfig, float8: Float8 = "none") -> tuple[int, int]:
    """Elements of one block's matrices: attention with temperature, feed-forward. float8: without those that are
    multiplied with in FP8."""
    with torch.device("meta"):
        block = Block(network, layer=0)

    def elements(module: nn.Module) -> int:
        matrices = {name: p for name, p in module.named_parameters() if p.dim() == 2}
        return sum(p.numel() for name, p in matrices.items() if float8 == "none" or not fits(name, p.shape))

    return elements(block.attention), elements(block.feed_forward)


def states(setup: Setup) -> tuple[dict[str, Part], dict[str, Part]]:
    """On the device and on the host. Parameters, gradients and AdamW's moments take 4 P, 4 P and 8 P bytes without
    ZeRO; with it as in arXiv 1910.02054. Muon has one moment of a matrix. What a save copies (weights and moments) is
    divided among the ranks anyway."""
    count, ranks, stage = parameter_count(setup.network), setup.ranks, setup.zero_stage
    width = setup.product_bytes if stage else FLOAT32
    trained, those = (
        trained_count(setup.network),
        " of those that are trained" if setup.network.attention.freezes else "",
    )
    parameters, gradients = Part(width * count, f"{width} P"), Part(FLOAT32 * trained, f"4 P{those}")
    moments = Part((SAVED_BYTES - FLOAT32) * trained, f"8 P{those}")
    if setup.optimizer == "muon":
        less = "4 less an element of the blocks' matrices"
        moments = Part(moments.bytes - FLOAT32 * muon_elements(setup.network), f"8 P, {less}")
    copy = Part((FLOAT32 * count + moments.bytes) / ranks, f"(4 P + {moments.formula}) / W, from the first step on")
    if stage:
        moments = Part(12 * count / ranks, "(8 + 4) P / W, with the float32 weights")
    if stage >= 2:
        buckets = 2 * FLOAT32 * BUCKET_ELEMENTS
        gradients = Part(FLOAT32 * count / ranks + buckets, "4 P / W and two buckets")
    if stage == 3:
        largest = max(sum(block_matrices(setup.network)), setup.network.vocab_size * setup.network.d_model)
        gathered = min(count, largest + BUCKET_ELEMENTS)
        parameters = Part(width * (count / ranks + gathered), f"{width} P / W and what is gathered at a time")
    host = {}
    if setup.offload_optimizer:
        host["optimizer state"], moments = moments, Part(0, "on the host")
    if setup.asynchronous_saves:
        host["copy of what is saved"] = copy
    return {"parameters": parameters, "gradients": gradients, "optimizer state": moments}, host
