"""The attention block: projections, positions, temperature, and the choice of entmax kernel, softmax path or a module
that is trained sparse."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from kernels import entmax_attention
from kernels.alpha_entmax.results import kept_bits as kept_bits  # for training.memory, which sees no kernels
from model.config import ModelConfig
from model.kv_cache import Extension, LayerCache
from model.layers import AdaptiveTemperature, HeadAlpha, ScalableTemperature
from model.rotary import rotary_tables, rotate
from model.sequence_parallel import HeadExchange, SequenceShards
from model.softmax import (
    cached_block_mask,
    cached_softmax_attention,
    cached_uses_flex,
    document_block_mask,
    softmax_attention,
    uses_flex,
)
from model.trained_sparse import trained_sparse


@dataclass(frozen=True)
class AttentionMetadata:
    """What all layers of one forward pass share about positions and documents.

    cu_seqlens: int32 (documents + 1,) or None. max_seqlen: upper bound of document lengths. log_position: float32 (T,),
    or (B or 1, T) with a cache: log(2 + position), positions counted within the document. rotary: cos and sin, float32
    (T, D / 2), or (B or 1, 1, T, D / 2) with a cache. alibi_slopes: float32 (H,), 0 for position-free heads.
    block_mask: FlexAttention's, where the softmax path needs it. alpha_progress: float32 scalar in [0, 1), how far
    alpha has moved from anneal_from to each head's own value; None for all the way. exchange: where ranks share the
    sequence; then cu_seqlens, max_seqlen and block_mask are of all tokens, the rest is of this rank's tokens and heads.
    sparse: what layers of a kind of model.trained_sparse share, None for others.
    """

    cu_seqlens: Tensor | None
    max_seqlen: int
    log_position: Tensor
    rotary: tuple[Tensor, Tensor] | None
    alibi_slopes: Tensor | None
    block_mask: BlockMask | None
    alpha_progress: Tensor | None
    exchange: HeadExchange | None
    sparse: Any


def make_metadata(
    config: ModelConfig,
    n_tokens: int,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    device: torch.device,
    *,
    alpha_progress: Tensor | None = None,
    shards: SequenceShards | None = None,
    number: Tensor | None = None,
) -> AttentionMetadata:
    """n_tokens: of this rank. Others as in `Transformer.forward`. Raises ValueError for shards of a kind of
    model.trained_sparse."""
    kind = trained_sparse(config)
    if kind is not None and shards is not None:
        raise ValueError(f"attention.kind is {config.attention.kind!r}: ranks cannot share its sequences")
    n_tokens *= shards.size if shards else 1
    position = torch.arange(n_tokens, device=device)
    if cu_seqlens is not None:
        position = position - cu_seqlens[torch.searchsorted(cu_seqlens, position, right=True) - 1]
    slopes = _alibi_slopes(config, device)
    block_mask = None
    if config.attention.is_softmax and uses_flex(device, cu_seqlens, slopes, config.window):
        block_mask = document_block_mask(n_tokens, cu_seqlens, config.window, device)
    max_seqlen = n_tokens if max_seqlen is None else max_seqlen
    exchange = HeadExchange(shards, config.n_heads, config.n_kv_heads) if shards else None
    last = position.max()
    if shards and exchange:
        position = shards.local_tokens(position)
        slopes = None if slopes is None else exchange.local_heads(slopes)
    rotary = rotary_tables(position, config, last) if config.positions == "rope" else None
    log_position = torch.log(2 + position.float())
    sparse = None if kind is None else kind.metadata(config, n_tokens, cu_seqlens, max_seqlen, device, number)
    return AttentionMetadata(
        cu_seqlens, max_seqlen, log_position, rotary, slopes, block_mask, alpha_progress, exchange, sparse
    )


def cached_metadata(config: ModelConfig, extension: Extension, alpha_progress: Tensor | None) -> AttentionMetadata:
    """For tokens that continue the rows of a cache: their positions are those that a full forward pass gives them."""
    position, device = extension.position, extension.position.device  # [b or 1, T]
    slopes = _alibi_slopes(config, device)
    rotary = None
    if config.positions == "rope":
        rotary = rotary_tables(position[:, None], config, position.max())
    block_mask = None
    if config.attention.is_softmax and cached_uses_flex(extension, slopes, config.window):
        block_mask = cached_block_mask(extension, config.window)
    log_position = torch.log(2 + position.float())
    kind = trained_sparse(config)
    sparse = None if kind is None else kind.cached_metadata(config, extension)
    return AttentionMetadata(
        None, position.shape[1], log_position, rotary, slopes, block_mask, alpha_progress, None, sparse
    )


def _alibi_slopes(config: ModelConfig, device: torch.device) -> Tensor | None:
    """float32 (H,): slopes of the ALiBi heads, then zeros; None where positions are not nape."""
    if config.positions != "nape":
        return None
    rank = torch.arange(config.n_heads, device=device, dtype=torch.float32)
    slopes = 1 / (rank + 1) if config.nape_slopes == "linear" else 2**-rank
    return slopes * (rank < config.n_alibi_heads)


# q, k, v, metadata, extension -> (B, H, T, D), or None for the layer's own attention: of policies and observers
AttentionOverride = Callable[[Tensor, Tensor, Tensor, AttentionMetadata, Extension | None], Tensor | None]


class Attention(nn.Module):
    """layer: its index, which decides whether it rotates queries and keys (nope_layers)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config, self.rotates = config, layer not in config.nope_layers
        heads, kv_heads, head_dim, width = config.n_heads, config.n_cached_heads, config.head_size, config.d_model
        self.wq = nn.Linear(width, heads * head_dim, bias=config.qkv_bias)
        self.wk = nn.Linear(width, kv_heads * head_dim, bias=config.qkv_bias)
        self.wv = nn.Linear(width, kv_heads * head_dim, bias=config.qkv_bias)
        self.wo = nn.Linear(heads * head_dim, width, bias=False)
        self.q_norm = nn.RMSNorm(head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, config.norm_eps) if config.qk_norm else None
        self.alpha = HeadAlpha(config.attention, heads) if config.attention.has_alpha else None
        self.temperature = self._temperature()
        sparse = trained_sparse(config)
        self.sparse = None if sparse is None else sparse(config, layer)
        self.override: AttentionOverride | None = None  # set by model.override.override_attention for a while

    def _temperature(self) -> ScalableTemperature | AdaptiveTemperature | None:
        """Under nape only the position-free heads are scaled: ALiBi heads are local already."""
        n_scaled = self.config.n_heads - self.config.n_alibi_heads
        if self.config.attention.kind == "ssmax":
            return ScalableTemperature(n_scaled)
        return AdaptiveTemperature(self.config, n_scaled) if self.config.attention.has_adaptive_temperature else None

    def forward(self, x: Tensor, metadata: AttentionMetadata, cache: LayerCache | None = None) -> Tensor:
        """x: normalised input (B, T, C) -> (B, T, C), T of this rank. With a cache (and no exchange), x continues its
        rows."""
        q, k, v, _ = self.attended(x, metadata)
        if metadata.exchange is not None:
            q, k, v = metadata.exchange.to_heads(q, k, v)
        if cache is not None:
            k, v = cache.append(k, v)
        extension = None if cache is None else cache.extension
        out = None if self.override is None else self.override(q, k, v, metadata, extension)
        if out is None:
            out = self._attend(x, q, k, v, metadata, cache)
        if metadata.exchange is not None:
            out = metadata.exchange.to_tokens(out)
        return self.wo(out.transpose(1, 2).flatten(2))

    def attended(self, x: Tensor, metadata: AttentionMetadata) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What attention computes with: q (B, H, T, D) times its temperature, k and v (B, G, T, D) (n_cached_heads for
        G), all in one dtype, and the temperature as in `_head_temperatures`. x: as in `forward`."""
        q, k, v = self._project(x, metadata)
        temperature = self._head_temperatures(x, metadata)
        if temperature is not None:
            q = q.float() * temperature[..., None]
        return q.to(v.dtype), k.to(v.dtype), v, temperature

    def _project(self, x: Tensor, metadata: AttentionMetadata) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, T, D), k and v (B, G, T, D), rotated where positions are rotary."""
        q, k, v = (w(x).unflatten(-1, (-1, self.config.head_size)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if metadata.rotary is not None and self.rotates:
            q, k = rotate(q, *metadata.rotary), rotate(k, *metadata.rotary)
        return q, k, v

    def _head_temperatures(self, x: Tensor, metadata: AttentionMetadata) -> Tensor | None:
        """float32 (B, H, T), 1 for unscaled heads."""
        if self.temperature is None:
            return None
        scaled = self.temperature(x, metadata.log_position)
        return nn.functional.pad(scaled, (0, 0, self.config.n_alibi_heads, 0), value=1.0)

    def _attend(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata, cache: LayerCache | None
    ) -> Tensor:
        """(B, H, T, D), of the heads in q."""
        extension = None if cache is None else cache.extension
        slopes, window, block_mask = metadata.alibi_slopes, self.config.window, metadata.block_mask
        if self.sparse is not None:
            alpha = None if self.alpha is None else self.alpha(q.device, metadata.alpha_progress)
            attended: Tensor = self.sparse(x, q, k, v, metadata.sparse, slopes, cache, alpha)
            return attended
        if self.alpha is not None:
            out = entmax_attention(
                q, k, v, alpha=self.kernel_alpha(self.alpha, q.device, metadata), cu_seqlens=metadata.cu_seqlens,
                kv_lens=None if extension is None else extension.kv_lens, alibi_slopes=slopes, window=window,
                backend=self.config.attention.backend,
            )  # fmt: skip
            assert isinstance(out, Tensor)
            return out
        if extension is not None:
            return cached_softmax_attention(
                q, k, v, extension=extension, alibi_slopes=slopes, window=window, block_mask=block_mask
            )
        return softmax_attention(
            q, k, v, cu_seqlens=metadata.cu_seqlens, max_seqlen=metadata.max_seqlen, alibi_slopes=slopes,
            window=window, block_mask=block_mask,
        )  # fmt: skip

    def kernel_alpha(self, heads: HeadAlpha, device: torch.device, metadata: AttentionMetadata) -> float | Tensor:
        """Alpha of the heads that this rank attends with."""
        if metadata.alpha_progress is None and not self.config.attention.learn_alpha:
            return self.config.attention.alpha  # a number: the kernels have faster instructions for 1.5 and 2
        alpha = heads(device, metadata.alpha_progress)
        return alpha if metadata.exchange is None else metadata.exchange.local_heads(alpha)
