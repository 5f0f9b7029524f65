"""What sparse attention did: support, live tiles, alpha and temperature of every head."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernels import entmax_attention
from kernels.common.visibility import TILE
from model.attention import Attention, AttentionMetadata, make_metadata
from model.dms.attention import DynamicMemorySparsification
from model.hierarchical.attention import HierarchicalEntmax
from model.kv_cache import Extension
from model.layers import HeadAlpha
from model.override import override_attention
from model.transformer import Transformer


@dataclass(frozen=True)
class LayerStats:
    """Statistics of one layer, per query head, float32 (H,): mean support size (keys with weight) per query; share of
    live 64 x 64 tiles; alpha (None for softmax kinds and dms); mean temperature of each head (1 for heads without one;
    None for kinds without one); of kind hierarchical the mean number of live blocks per query; of it and of dms the
    share of pairs of a query and a key that it may see which is read (None for other kinds)."""

    support_mean: Tensor
    live_share: Tensor
    alpha: Tensor | None = None
    temperature: Tensor | None = None
    temperature_max: Tensor | None = None
    live_blocks: Tensor | None = None
    pairs_read: Tensor | None = None


@torch.no_grad()
def attention_stats(model: Transformer, tokens: Tensor, cu_seqlens: Tensor | None = None) -> list[LayerStats]:
    """One LayerStats a layer, from a forward pass over tokens (B, T). Raises ValueError as record_stats."""
    progress = model.alpha_progress()
    metadata = make_metadata(model.config, tokens.shape[1], cu_seqlens, None, tokens.device, alpha_progress=progress)
    with record_stats(model) as stats:
        x = model.embedding(tokens)
        for block in model.layers():
            x = block.forward(x, metadata)  # .forward: a compiled block would be traced once more for this rare call
    return stats


@contextmanager
def record_stats(model: Transformer) -> Iterator[list[LayerStats]]:
    """Inside, each layer's attention appends its LayerStats, of whole sequences on one rank.

    Raises: ValueError for kinds without (AttentionConfig.has_statistics), and where the model's attention is overridden
    already.
    """
    stats: list[LayerStats] = []
    recorders, hooks = [], []
    kind = model.config.attention
    if not kind.has_statistics:
        what = "is dense" if kind.is_softmax else "chooses keys before it weighs them"
        raise ValueError(f"attention kind {kind.kind!r} {what}: it has no support statistics")
    for block in model.layers():
        attention = block.attention
        if isinstance(attention.sparse, DynamicMemorySparsification):
            hooks.append(attention.sparse.register_forward_hook(_of_evictions(stats)))
        if attention.alpha is None:
            continue
        recorder = _LayerRecorder(attention, attention.alpha, stats)
        recorders.append(recorder)
        if attention.temperature is not None:
            hooks.append(attention.temperature.register_forward_hook(recorder.keep_temperature))
    try:
        with override_attention(model, recorders) if recorders else nullcontext():
            yield stats
    finally:
        for hook in hooks:
            hook.remove()


def _of_evictions(stats: list[LayerStats]) -> Callable[[nn.Module, Any, Tensor], None]:
    """A hook that appends what a layer of kind dms reads: decisions without noise, as outside of training."""

    def hook(sparse: nn.Module, inputs: Any, _: Tensor) -> None:
        assert isinstance(sparse, DynamicMemorySparsification)
        x, q, k, _, tokens = inputs[:5]
        evicted = sparse.evicted(x, tokens).repeat_interleave(q.shape[1] // k.shape[1], 1)  # [B, H, T]
        all_kept = torch.zeros_like(evicted)
        read, visible = (tokens.keys_read(gone).float().mean(0) for gone in (evicted, all_kept))
        live, of = (tokens.tiles(gone, TILE).sum((2, 3)).float().mean(0) for gone in (evicted, all_kept))
        stats.append(LayerStats(read / q.shape[2], live / of, pairs_read=read / visible))

    return hook


class _LayerRecorder:
    """Attends as one layer does, and appends what came of it."""

    def __init__(self, attention: Attention, alpha: HeadAlpha, stats: list[LayerStats]) -> None:
        self.attention, self.alpha, self.stats = attention, alpha, stats
        self.temperature: Tensor | None = None  # float32 (B, H - unscaled, T)

    def keep_temperature(self, _module: nn.Module, _inputs: Any, scaled: Tensor) -> None:
        self.temperature = scaled

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata, extension: Extension | None
    ) -> Tensor:
        assert metadata.exchange is None and extension is None
        if isinstance(self.attention.sparse, HierarchicalEntmax):
            return self._by_blocks(self.attention.sparse, q, k, v, metadata)
        config = self.attention.config
        out, measured = entmax_attention(
            q, k, v, alpha=self.attention.kernel_alpha(self.alpha, q.device, metadata), cu_seqlens=metadata.cu_seqlens,
            alibi_slopes=metadata.alibi_slopes, window=config.window, backend=config.attention.backend,
            return_stats=True,
        )  # fmt: skip
        mean, largest = self._temperatures()
        self.stats.append(
            LayerStats(
                support_mean=measured.support.float().mean((0, 2)),
                live_share=measured.live_share.mean(0),
                alpha=self.alpha(q.device, metadata.alpha_progress),
                temperature=mean,
                temperature_max=largest,
            )
        )
        return out

    def _by_blocks(
        self, sparse: HierarchicalEntmax, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata
    ) -> Tensor:
        blocks, slopes = metadata.sparse, metadata.alibi_slopes
        alpha = self.alpha(q.device, metadata.alpha_progress)
        log_p = sparse.choose(q, k, blocks, slopes, alpha)
        live, visible = log_p != -torch.inf, blocks.visible(torch.arange(q.shape[2], device=q.device))[:, None]
        support = blocks.tokens_read(live).float().mean((0, 2))
        tiles, total = (blocks.tiles(one, TILE).sum((2, 3)).float().mean(0) for one in (live, visible))
        mean, largest = self._temperatures()
        self.stats.append(
            LayerStats(
                support_mean=support,
                live_share=tiles / total,
                alpha=alpha,
                temperature=mean,
                temperature_max=largest,
                live_blocks=live.sum(-1).float().mean((0, 2)),
                pairs_read=support / blocks.tokens_read(visible).float().mean(),
            )
        )
        return sparse.attend(q, k, v, log_p, blocks, slopes)

    def _temperatures(self) -> tuple[Tensor | None, Tensor | None]:
        """Mean and largest of each head, float32 (H,)."""
        if self.temperature is None:
            return None, None
        unscaled, scaled = (0, 0, self.attention.config.n_alibi_heads, 0), self.temperature
        self.temperature = None
        heads = nn.functional.pad(scaled, unscaled, value=1.0)
        return heads.mean((0, 2)), heads.amax((0, 2))
