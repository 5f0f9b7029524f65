"""Attention kinds that are trained sparse: what `model.attention` makes a layer's SparseAttention of, and a loss."""

from torch import Tensor

from model.config import ModelConfig
from model.dms.attention import DynamicMemorySparsification
from model.dsa.attention import DeepSeekSparseAttention
from model.hierarchical.attention import HierarchicalEntmax
from model.nsa.attention import NativeSparseAttention
from model.sparse_attention import SparseAttention

KINDS: dict[str, type[SparseAttention]] = {
    "nsa": NativeSparseAttention,
    "dsa": DeepSeekSparseAttention,
    "dms": DynamicMemorySparsification,
    "hierarchical": HierarchicalEntmax,
}


def trained_sparse(config: ModelConfig) -> type[SparseAttention] | None:
    """The class of a kind's module; None for kinds that weigh every key."""
    return KINDS.get(config.attention.kind)


def auxiliary_loss(config: ModelConfig, auxiliary: Tensor, step: int) -> Tensor:
    """What is added to the language model's loss, a token.

    Args:
        auxiliary: scalar, the sum of what layers gave to `add_auxiliary`, over the number of tokens. Of dsa its
            indexers' losses; of dms the layers' shares of evicted tokens, whose mean is to reach a target: the loss is
            max(0, target - mean), of each micro-batch by itself.
        step: optimizer steps done.
    """
    dsa, dms = config.attention.dsa, config.attention.dms
    if dms is not None:
        return dms.loss_weight * (dms.target(step) - auxiliary / config.n_layers).clamp(min=0)
    return auxiliary if dsa is None else dsa.loss_weight * auxiliary
