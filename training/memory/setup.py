"""What decides the memory of one device."""

from dataclasses import dataclass

import torch

from model.config import ModelConfig
from model.transformer import Block
from training.distributed.config import check_optimizer
from training.step.float8 import Float8, check_linears, check_products

FLOAT32, FLOAT8 = 4, 1  # bytes


@dataclass(frozen=True)
class Setup:
    """What decides the memory of one device.

    Args:
        network: architecture.
        tokens: N, of one micro-batch.
        sequence_length: upper bound of a document's length.
        ranks: W, over all nodes.
        sequence_parallel, zero_stage, offload_optimizer: as in parallel.*.
        precision: of the Trainer: 32-true or bf16-mixed.
        activation_checkpointing, mlp_tile_tokens, loss_chunk_tokens: as in model.*.
        loss_backend: resolved: chunked or liger.
        keeps_gradients: gradients exist while a backward pass begins: with accumulation, or where an engine keeps them.
        cuda: with the kernels that run on CUDA, else those on CPU.
        compiled: as model.compile.
        float8: as model.float8.
        optimizer: as model.optimizer.name.
        asynchronous_saves: as checkpoint.asynchronous.
        teacher: architecture of model.distill.teacher.
    """

    network: ModelConfig
    tokens: int
    sequence_length: int
    ranks: int = 1
    sequence_parallel: int = 1
    zero_stage: int = 0
    offload_optimizer: bool = False
    precision: str = "32-true"
    activation_checkpointing: str = "none"
    mlp_tile_tokens: int = 0
    loss_chunk_tokens: int = 2048
    loss_backend: str = "chunked"
    cuda: bool = True
    keeps_gradients: bool = True
    compiled: bool = False
    float8: Float8 = "none"
    optimizer: str = "adamw"
    asynchronous_saves: bool = False
    teacher: ModelConfig | None = None

    def __post_init__(self) -> None:
        if self.precision not in ("32-true", "bf16-mixed"):
            raise ValueError(f"trainer.precision is {self.precision!r}: the estimate knows 32-true and bf16-mixed")
        check_optimizer(self.zero_stage, self.optimizer)
        with torch.device("meta"):
            check_linears(self.float8, [Block(self.network, layer=0)])  # all blocks have the same sizes
        check_products(
            self.float8, precision=self.precision, tokens=self.local_tokens, tile_tokens=self.mlp_tile_tokens
        )

    @property
    def local_tokens(self) -> int:
        return self.tokens // self.sequence_parallel

    @property
    def product_bytes(self) -> int:
        """w."""
        return 2 if self.precision == "bf16-mixed" else 4

    @property
    def operands_in_float8(self) -> bool:
        """Whether the weights' gradients have operands in FP8, which compiled blocks keep; eager ones keep bfloat16."""
        return self.float8 in ("tensorwise", "rowwise")

    @property
    def residual_bytes(self) -> int:
        """r."""
        return self.product_bytes if self.zero_stage else 4

    @property
    def casts(self) -> bool:
        """Whether products cast their float32 operands, and keep the copies."""
        return self.residual_bytes != self.product_bytes

    @property
    def tiled(self) -> bool:
        return 0 < self.mlp_tile_tokens < self.local_tokens
