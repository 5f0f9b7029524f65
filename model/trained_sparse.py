"""Attention kinds that are trained sparse, each a module of its own beside a layer's projections.

What `model.attention` asks of such a class: `KIND(config)`, a module made of the ModelConfig; the static
`metadata(config, n_tokens, cu_seqlens, max_seqlen, device)` and `cached_metadata(config, extension)`, what the layers
of one forward pass share; and forward(x, q, k, v, metadata, slopes) -> (B, H, n, D), with x the layer's normalised
input (B, n, C), and k and v of `ModelConfig.n_cached_heads` heads.
"""

from model.config import ModelConfig
from model.nsa.attention import NativeSparseAttention

KINDS: dict[str, type[NativeSparseAttention]] = {"nsa": NativeSparseAttention}


def trained_sparse(config: ModelConfig) -> type[NativeSparseAttention] | None:
    """The class of a kind's module; None for kinds that weigh every key."""
    return KINDS.get(config.attention.kind)
