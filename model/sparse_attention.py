"""What a kind of attention that is trained sparse is to the layers around it, and to the loss."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.kv_cache import Extension, LayerCache


class SparseAttention(nn.Module):
    """Attends in the layers of one kind, beside their projections.

    A kind whose choice has no gradient may learn it from a loss of its own, which it gives to `add_auxiliary`
    (model.trained_sparse.auxiliary_loss says what becomes of it).
    """

    collected: list[Tensor] | None = None  # set by collected_auxiliary for a while

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()

    @staticmethod
    def metadata(
        config: ModelConfig,
        n_tokens: int,
        cu_seqlens: Tensor | None,
        max_seqlen: int,
        device: torch.device,
        number: Tensor | None = None,
    ) -> Any:
        """What the layers of one forward pass share.

        Args:
            cu_seqlens: int32 (documents + 1,), which may be empty ones, or None for one document a row.
            max_seqlen: an upper bound of the documents' lengths.
            number: as in `Transformer.forward`.
        """
        raise NotImplementedError

    @staticmethod
    def cached_metadata(config: ModelConfig, extension: Extension) -> Any:
        """For tokens that continue the rows of a cache."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        metadata: Any,
        slopes: Tensor | None,
        cache: LayerCache | None = None,
        alpha: Tensor | None = None,
    ) -> Tensor:
        """x: the layer's normalised input (B, n, C), q: (B, H, n, D), k and v: (B, G, keys, D) of the metadata's keys
        (ModelConfig.n_cached_heads for G), all in one dtype. slopes: as in AttentionMetadata. cache: has taken k and v
        of the n tokens already. alpha: float32 (H,), of kinds that have one. Returns (B, H, n, D)."""
        raise NotImplementedError

    @property
    def has_auxiliary(self) -> bool:
        """Whether this forward pass needs the loss: in each that is trained with, since one that is recomputed in
        backward has to do what the first one did."""
        return self.training and torch.is_grad_enabled()

    def add_auxiliary(self, loss: Tensor) -> None:
        """loss: scalar, summed over tokens, with its gradient. Outside of `collected_auxiliary`, as in recomputation,
        it is dropped."""
        if self.collected is not None:
            self.collected.append(loss)


def freeze_dense(network: nn.Module) -> None:
    """Leave only parameters of SparseAttention to be trained."""
    network.requires_grad_(False)
    for module in network.modules():
        if isinstance(module, SparseAttention):
            module.requires_grad_(True)


@contextmanager
def collected_auxiliary(network: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, the losses that layers of a network add in a forward pass, in their order."""
    modules = [module for module in network.modules() if isinstance(module, SparseAttention)]
    losses: list[Tensor] = []
    for module in modules:
        module.collected = losses
    try:
        yield losses
    finally:
        for module in modules:
            module.collected = None
