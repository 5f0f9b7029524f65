"""How attention spreads its weights: exact weights of sampled queries, of every kind of attention.

The attention paths never hold weights. Here they are computed once more, for some queries and a block of rows at a
time, from the queries and keys that each layer attends with.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import entmax
from model.attention import Attention, AttentionMetadata, make_metadata
from model.attention_stats import LayerStats, record_stats
from model.dms.attention import DynamicMemorySparsification
from model.hierarchical.attention import HierarchicalEntmax
from model.transformer import Transformer

WEIGHTS_AT_ONCE = 2**23  # float32 scores of one block of rows: 32 MiB, and a few temporaries of their size


@dataclass(frozen=True)
class WeightShape:
    """Statistics of one layer, per query head, float32 (H,), means over the sampled queries.

    Args:
        entropy: of a query's weights, in nats: log n where n keys share the weight evenly.
        relative_entropy: entropy over the log of the number of visible keys, in [0, 1]; 0 where one key is visible.
        sink_share: weight on the first tokens of the document.
    """

    entropy: Tensor
    relative_entropy: Tensor
    sink_share: Tensor


@torch.no_grad()
def layer_profiles(
    model: Transformer, tokens: Tensor, queries: Tensor, sink_tokens: int
) -> tuple[list[WeightShape], list[LayerStats]]:
    """One forward pass over a document.

    Args:
        tokens: int64 (1, T), one document.
        queries: int64 (n,), positions of the sampled queries, on the model's device.
        sink_tokens: how many of the document's first tokens count as the sink, at least 1.

    Returns: one WeightShape a layer, and one LayerStats a layer (none for softmax kinds, which have all weights).
    Raises ValueError for several rows, for positions outside 0 ... T - 1, and for kinds
    without profile (AttentionConfig.has_profile).
    """
    if not model.config.attention.has_profile:
        kind = model.config.attention.kind
        raise ValueError(f"attention kind {kind!r} chooses keys before it weighs them: it has no profile")
    if tokens.shape[0] != 1:
        raise ValueError(f"tokens must be one document (1, T), got {tuple(tokens.shape)}")
    if not 0 <= int(queries.min()) <= int(queries.max()) < tokens.shape[1]:
        raise ValueError(f"queries must lie in 0 ... {tokens.shape[1] - 1}, got {queries.tolist()}")
    progress = model.alpha_progress()
    metadata = make_metadata(model.config, tokens.shape[1], None, None, tokens.device, alpha_progress=progress)
    shapes: list[WeightShape] = []
    none: list[LayerStats] = []
    with record_stats(model) if model.config.attention.has_statistics else nullcontext(none) as stats:
        x = model.embedding(tokens)
        for block in model.layers():
            shapes.append(weight_shape(block.attention, block.attention_norm(x), metadata, queries, sink_tokens))
            x = block.forward(x, metadata)  # .forward: a compiled block would be traced once more for this rare call
    return shapes, stats


def weight_shape(
    attention: Attention, x: Tensor, metadata: AttentionMetadata, queries: Tensor, sink_tokens: int
) -> WeightShape:
    """x: normalised input (1, T, C); the others as in `layer_profiles`. A block of rows of all heads at a time."""
    q, k, _, _ = attention.attended(x, metadata)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k = q[0][:, queries].to(dtype), k[0].to(dtype)
    heads, n_keys = q.shape[0], k.shape[1]
    evicted = None
    if isinstance(attention.sparse, DynamicMemorySparsification):
        evicted = attention.sparse.evicted(x, metadata.sparse)[0].repeat_interleave(heads // len(k), 0)
    sums = torch.zeros(3, heads, device=q.device)
    for rows in torch.arange(len(queries), device=q.device).split(max(1, WEIGHTS_AT_ONCE // (heads * n_keys))):
        weights, n_visible = attention_weights(attention, q[:, rows], k, queries[rows], metadata, evicted)
        entropy = torch.special.entr(weights).sum(-1)  # [H, rows]
        relative = torch.where(n_visible > 1, entropy / n_visible.log(), 0.0)
        sink = weights[..., :sink_tokens].sum(-1)
        sums += torch.stack([entropy, relative, sink]).sum(-1)
    return WeightShape(*(sums / len(queries)))


def attention_weights(
    attention: Attention,
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    metadata: AttentionMetadata,
    evicted: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Weights of some queries over all keys of one document.

    Args:
        q: (H, n, D), times its temperature, of the tokens at positions `rows` (n,).
        k: (G, T, D), in q's dtype: float32 or float64.
        evicted: bool (H, T), of kind dms the keys that only queries near them see; None for others.

    Returns: weights (H, n, T), 0 for keys that are not visible, and the number of visible keys int64 (n,).
    """
    with torch.autocast(q.device.type, enabled=False):
        grouped = q.unflatten(0, (k.shape[0], -1)).flatten(1, 2)  # [G, H / G * n, D]
        scores = (grouped @ k.transpose(1, 2)).view(q.shape[0], len(rows), -1) * q.shape[2] ** -0.5
    distance = rows[:, None] - torch.arange(k.shape[1], device=q.device)  # [n, T]
    if metadata.alibi_slopes is not None:
        scores -= metadata.alibi_slopes.to(q.dtype)[:, None, None] * distance
    window = attention.config.window
    visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    scores.masked_fill_(~visible, -torch.inf)
    if evicted is not None:
        scores.masked_fill_(evicted[:, None] & (distance > metadata.sparse.window), -torch.inf)
    if attention.alpha is None:
        return scores.softmax(-1), visible.sum(-1)
    alpha = attention.alpha(q.device, metadata.alpha_progress)
    if isinstance(attention.sparse, HierarchicalEntmax):
        blocks = metadata.sparse
        log_p = attention.sparse.choose(q[None], k[None], blocks, metadata.alibi_slopes, alpha, rows)[0]
        return (scores + log_p[..., blocks.key_block]).softmax(-1), visible.sum(-1)
    return entmax(scores, alpha[:, None, None], dim=-1), visible.sum(-1)
