"""Hierarchical entmax (after DashAttention, arXiv:2605.18753): entmax over blocks, softmax over the tokens inside."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import block_bias_attention, block_mean_scores, entmax
from kernels.block_sparse.attention import runs_on_triton
from model.config import ModelConfig
from model.hierarchical.blocks import Blocks, cached_blocks, packed_blocks
from model.kv_cache import Extension, LayerCache
from model.sparse_attention import SparseAttention
from model.visible_attention import AGAIN, attend_masked, blocks_of_rows


class HierarchicalEntmax(SparseAttention):
    """What attends in the layers of kind "hierarchical"; it has no parameters beside the layer's alphas.

    A query weighs the blocks up to its own by p, alpha-entmax of its scores with their summaries (the mean of a block's
    keys, of its own block's keys up to itself), and the tokens of blocks with p > 0 by softmax of their scores plus
    log p. The gradient reaches the choice through log p. Blocks with p = 0 are not read; some block always has more.

    Positions. rope: keys are rotated before they are averaged. nape: ALiBi takes the distance of tokens, and that to
    the last token of a block that the query sees. nope: none.
    """

    @staticmethod
    def metadata(
        config: ModelConfig,
        n_tokens: int,
        cu_seqlens: Tensor | None,
        max_seqlen: int,
        device: torch.device,
        number: Tensor | None = None,
    ) -> Blocks:
        assert config.attention.hierarchical is not None
        return packed_blocks(config.attention.hierarchical, n_tokens, cu_seqlens, max_seqlen, device)

    @staticmethod
    def cached_metadata(config: ModelConfig, extension: Extension) -> Blocks:
        assert config.attention.hierarchical is not None
        return cached_blocks(config.attention.hierarchical, extension)

    @torch.compiler.disable  # rows are weighed in parts
    def forward(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        metadata: Blocks,
        slopes: Tensor | None,
        cache: LayerCache | None = None,
        alpha: Tensor | None = None,
    ) -> Tensor:
        assert alpha is not None
        return self.attend(q, k, v, self.choose(q, k, metadata, slopes, alpha), metadata, slopes)

    def choose(
        self, q: Tensor, k: Tensor, blocks: Blocks, slopes: Tensor | None, alpha: Tensor, rows: Tensor | None = None
    ) -> Tensor:
        """log p in float32 (float64 for such k), (B, H, n, C), -inf for blocks that are not read. Backward computes it
        again, a block of rows at a time. rows: int64 (n,), the queries that q holds; None for all."""
        function, inputs = (_by_kernel if runs_on_triton(q) else _by_means)(q, k, blocks, slopes, alpha, rows)
        if torch.is_grad_enabled():
            parts = [checkpoint(function, *one, **AGAIN) for one in inputs]
        else:
            parts = [function(*one) for one in inputs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, log_p: Tensor, blocks: Blocks, slopes: Tensor | None) -> Tensor:
        """log_p: as `choose` gives it for all queries."""
        if not runs_on_triton(q):
            return attend_masked(q, k, v, lambda log_p: blocks.view(log_p, slopes), log_p)
        return block_bias_attention(
            q, k, v, log_p, *blocks.seen_keys, block_size=blocks.size, alibi_slopes=slopes
        )  # fmt: skip


Parts = tuple[Callable[..., Tensor], list[tuple[Any, ...]]]  # what gives log p of some rows, and its arguments


def _by_kernel(
    q: Tensor, k: Tensor, blocks: Blocks, slopes: Tensor | None, alpha: Tensor, rows: Tensor | None
) -> Parts:
    """As `HierarchicalEntmax.choose`: scores by the kernel, mostly of all rows at once."""
    first, own = blocks.seen_keys if rows is None else (x[:, rows] for x in blocks.seen_keys)
    parts = blocks_of_rows(q.shape[2], blocks.n_blocks, None, q.shape[0] * q.shape[1], q.device)
    if len(parts) > 1:
        k = k.to(torch.promote_types(k.dtype, torch.float32))  # its gradient is summed over parts
    return _log_p_by_kernel, [
        (q[:, :, part], k, blocks, first[:, part], own[:, part], slopes, alpha) for part in parts
    ]  # fmt: skip


def _log_p_by_kernel(
    q: Tensor, k: Tensor, blocks: Blocks, first_key: Tensor, own_key: Tensor, slopes: Tensor | None, alpha: Tensor
) -> Tensor:
    scores = block_mean_scores(
        q, k, first_key, own_key, blocks.block_start, blocks.block_ends, block_size=blocks.size,
        n_blocks=blocks.n_blocks, alibi_slopes=slopes,
    )  # fmt: skip
    return _log_of_weights(scores, alpha)


def _by_means(q: Tensor, k: Tensor, blocks: Blocks, slopes: Tensor | None, alpha: Tensor, rows: Tensor | None) -> Parts:
    """As `HierarchicalEntmax.choose`, by products with all means that some rows may see."""
    batch, heads, n, _ = q.shape
    with torch.autocast(q.device.type, enabled=False):
        means = blocks.running_means(k)
    n_full, inputs = len(blocks.full), []
    reach = blocks.reach if rows is None else None
    for part in blocks_of_rows(n, n_full + blocks.n_blocks, reach, batch * heads, q.device, blocks.size):
        if rows is None:
            queries = torch.arange(part.start, part.stop, device=q.device)
            within = blocks.full_within_reach(part)
        else:
            queries, within = rows[part], torch.arange(n_full, device=q.device)
        inputs.append((q[:, :, part], means, blocks, queries, within, slopes, alpha))
    return _log_p, inputs


def _log_p(
    q: Tensor, means: Tensor, blocks: Blocks, rows: Tensor, within: Tensor, slopes: Tensor | None, alpha: Tensor
) -> Tensor:
    """Of the queries `rows`. means: of Blocks.running_means. within: of Blocks.full_within_reach."""
    with torch.autocast(q.device.type, enabled=False):
        grouped = q.to(means.dtype).unflatten(1, (means.shape[1], -1))
        scores = _scores(grouped, means, blocks, rows, within).flatten(1, 2)
        if slopes is not None:
            scores = scores - slopes.to(means.dtype)[:, None, None] * blocks.distance_to_blocks(rows)[:, None]
        return _log_of_weights(scores.masked_fill(~blocks.visible(rows)[:, None], -torch.inf), alpha)


def _log_of_weights(scores: Tensor, alpha: Tensor) -> Tensor:
    """log p of (B, H, rows, C)."""
    with torch.autocast(scores.device.type, enabled=False):
        p = entmax(scores, alpha[:, None, None])
    dead = p == 0  # not where it is NaN, which is to be seen
    return p.masked_fill(dead, 1).log().masked_fill(dead, -torch.inf)


def _scores(q: Tensor, means: Tensor, blocks: Blocks, rows: Tensor, within: Tensor) -> Tensor:
    """(B, G, H / G, rows, C), with the full blocks' summaries, and with that of the query's own block as far as it
    sees it; anything behind it. q: (B, G, H / G, rows, D)."""
    place = blocks.own_place[:, rows, None][:, None]  # [b, 1, rows, 1]
    own = means.flatten(2, 3).gather(2, place.expand(*means.shape[:2], -1, means.shape[-1]))  # [B, G, rows, D]
    summaries = means[:, :, blocks.full[within.clamp(max=len(blocks.full) - 1)], -1]  # [B, G, W, D]
    block = torch.arange(blocks.n_blocks, device=q.device)
    index = (blocks.first_full[rows, None] - within[0] + block).clamp(max=len(within) - 1)  # [rows, C]
    scores = q @ summaries[:, :, None].mT  # [B, G, H / G, rows, W]
    scores = scores.gather(-1, index.expand(*scores.shape[:3], -1, -1))
    is_own = (blocks.own_block[:, rows, None] == block)[:, None, None]  # [b, 1, 1, rows, C]
    return torch.where(is_own, (q * own[:, :, None]).sum(-1, keepdim=True), scores) * q.shape[-1] ** -0.5
