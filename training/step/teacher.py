"""The frozen model whose predictions a run is trained towards: options, what it may be, and its forward pass."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from common.checks import check_number
from model.checkpoint import CheckpointInfo, resolve_checkpoint
from model.checksums import Verify
from model.config import ModelConfig
from model.loading import load_model, model_fingerprint
from model.sequence_parallel import SequenceShards, check_heads
from model.transformer import Transformer
from training.step.activations import tile_feed_forward

# of a Trainer's precision: what its autocast multiplies in; others have none
PRODUCTS = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16, "16-mixed": torch.float16}


@dataclass
class DistillConfig:
    """Distillation from a frozen teacher's logits (Hinton et al., arXiv 1503.02531), in training only:

        (1 - weight) * token loss + weight * temperature^2 * KL(teacher || student)

    at each token with a label. weight 1 is the divergence alone, as Dynamic Memory Sparsification retrofits (arXiv
    2506.05345); 0 leaves the token loss, and the divergence is logged only.

    Args:
        teacher: run (its newest complete checkpoint), checkpoint, or a folder of model.export; null for none. It has
            the tokenizer of the data, and as many words as the model.
        weight: share of the divergence, in [0, 1].
        temperature: that both models' logits are divided by in the divergence, in [0.01, 1000].

    Without a teacher weight and temperature keep their defaults.
    """

    teacher: str | None = None
    weight: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_number("model.distill.weight", self.weight, least=0, most=1)
        check_number("model.distill.temperature", self.temperature, least=0.01, most=1e3)
        if self.teacher is None and (self.weight, self.temperature) != (1.0, 1.0):
            raise ValueError(
                f"model.distill has weight {self.weight:g} and temperature {self.temperature:g}, but no teacher: give "
                "model.distill.teacher, or leave these out"
            )


def find_teacher(path: str | None, network: ModelConfig, sequence_parallel: int) -> CheckpointInfo | None:
    """The teacher's checkpoint, of which no weights are read yet; None where there is to be none.

    Args:
        path: model.distill.teacher.
        network: of the student.
        sequence_parallel: ranks that share each sequence, in the teacher as in the student.

    Raises:
        ValueError: there is no complete checkpoint, or the teacher cannot teach this student.
    """
    if path is None:
        return None
    try:
        found = resolve_checkpoint(path)
        teacher = found.architecture
    except (FileNotFoundError, ValueError) as error:  # which name the folder
        raise ValueError(f"model.distill.teacher: {error}") from error
    try:
        check_heads(teacher, sequence_parallel)
    except ValueError as error:
        raise ValueError(f"model.distill.teacher is {path!r}: {error}") from error
    if teacher.vocab_size != network.vocab_size:
        raise ValueError(
            f"model.distill.teacher is {path!r} with vocab_size {teacher.vocab_size}, but that of model.network is "
            f"{network.vocab_size}: expected the same words; choose a teacher of this vocabulary"
        )
    if network.attention.freezes:
        raise ValueError(
            f"model.distill.teacher is {path!r}, but model.network.attention.dsa.freeze leaves no weight that its "
            "predictions could train: expected freeze false, or no teacher"
        )
    return found


def check_distillation(config: DistillConfig, *, loss_backend: str, cuda_graphs: bool) -> None:
    """Raises ValueError for what cannot be beside a teacher."""
    if config.teacher is None:
        return
    told = f"model.distill.teacher is {config.teacher!r}"
    if loss_backend == "liger":
        raise ValueError(f"{told}, but model.loss_backend is 'liger', which has no such divergence: set it to auto")
    if cuda_graphs:
        raise ValueError(f"{told}, but model.cuda_graphs is true, and a teacher is not captured: set it to false")


class Teacher:
    """A model in eval mode, without gradients. It is no module, so that a LightningModule that holds it neither trains,
    nor saves, nor divides it among ranks: each rank has it whole.

    Attributes:
        model: on the CPU until `place`.
        path: of its checkpoint.
        identity: fingerprint of its weights (model_fingerprint), and its step.
    """

    def __init__(self, model: Transformer, path: Path, step: int) -> None:
        self.model, self.path = model.eval().requires_grad_(False), path
        self.identity = f"{model_fingerprint(model)[:12]} (step {step})"
        self.products: torch.dtype | None = None

    def place(self, device: torch.device, precision: str, *, compile: bool, tile_tokens: int) -> None:
        """Move to `device`, in float32. Under autocast the matrices of blocks are kept in the dtype that it multiplies
        in, to which it would cast them at each step: the same predictions as in float32 under autocast, which
        evaluation computes with, in less memory.

        Args:
            precision: of the Trainer.
            compile, tile_tokens: as model.compile and model.mlp_tile_tokens of the student.
        """
        self.products = PRODUCTS.get(precision)
        self.model.to(device, torch.float32)  # exported weights may be bfloat16
        for linear in cast_linears(self.model):
            linear.to(self.products or linear.weight.dtype)
        tile_feed_forward(self.model.layers(), tile_tokens)
        if compile:
            # its blocks have the student's code, for whose forms the 8 that torch allows suffice just so
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 16)
            self.model.compile_blocks()

    @torch.no_grad()
    def hidden(
        self, tokens: Tensor, cu_seqlens: Tensor | None, max_seqlen: int, shards: SequenceShards | None
    ) -> Tensor:
        """Hidden states (B, T, C of the teacher), before the head. Arguments as of `Transformer.forward`."""
        enabled = self.products is not None
        with torch.autocast(tokens.device.type, dtype=self.products, enabled=enabled):
            hidden: Tensor = self.model(tokens, cu_seqlens, max_seqlen, shards)
        return hidden


def cast_linears(model: Transformer) -> list[nn.Linear]:
    """The linears that run under autocast, and only so: the same in all kinds of attention."""
    found = []
    for block in model.layers():
        attention, feed_forward = block.attention, block.feed_forward
        found += [attention.wq, attention.wk, attention.wv, attention.wo]
        found += [feed_forward.w_gate, feed_forward.w_up, feed_forward.w_down]
    return found


def load_teacher(checkpoint: CheckpointInfo, verify: Verify = "checksum") -> Teacher:
    """Raises ValueError as load_model does."""
    loaded = load_model(checkpoint.path, verify=verify)
    return Teacher(loaded.model, loaded.path, loaded.step)
