"""Attention kinds that are trained sparse: what `model.attention` makes a layer's SparseAttention of."""

from model.config import ModelConfig
from model.dsa.attention import DeepSeekSparseAttention
from model.hierarchical.attention import HierarchicalEntmax
from model.nsa.attention import NativeSparseAttention
from model.sparse_attention import SparseAttention

KINDS: dict[str, type[SparseAttention]] = {
    "nsa": NativeSparseAttention,
    "dsa": DeepSeekSparseAttention,
    "hierarchical": HierarchicalEntmax,
}


def trained_sparse(config: ModelConfig) -> type[SparseAttention] | None:
    """The class of a kind's module; None for kinds that weigh every key."""
    return KINDS.get(config.attention.kind)
