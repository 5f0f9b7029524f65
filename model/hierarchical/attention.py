"""Hierarchical entmax (after DashAttention, arXiv:2605.18753): entmax over blocks, softmax over the tokens inside."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import block_bias_attention, entmax
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
        batch, heads, n, _ = q.shape
        with torch.autocast(q.device.type, enabled=False):
            means = blocks.running_means(k)
        n_full, size = len(blocks.full), blocks.size
        reach = blocks.reach if rows is None else None
        parts = []
        for part in blocks_of_rows(n, n_full + blocks.n_blocks, reach, batch * heads, q.device, size):
            if rows is None:
                queries = torch.arange(part.start, part.stop, device=q.device)
                within = blocks.full_within_reach(part)
            else:
                queries, within = rows[part], torch.arange(n_full, device=q.device)
            inputs = (q[:, :, part], means, blocks, queries, within, slopes, alpha)
            parts.append(checkpoint(_log_p, *inputs, **AGAIN) if torch.is_grad_enabled() else _log_p(*inputs))
        return torch.cat(parts, dim=2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, log_p: Tensor, blocks: Blocks, slopes: Tensor | None) -> Tensor:
        """log_p: as `choose` gives it for all queries."""
        if not runs_on_triton(q):
            return attend_masked(q, k, v, lambda log_p: blocks.view(log_p, slopes), log_p)
        return block_bias_attention(
            q, k, v, log_p, *blocks.seen_keys, block_size=blocks.size, alibi_slopes=slopes
        )  # fmt: skip


def _log_p(
    q: Tensor, means: Tensor, blocks: Blocks, rows: Tensor, within: Tensor, slopes: Tensor | None, alpha: Tensor
) -> Tensor:
    """As `choose`, of the queries `rows`. means: of Blocks.running_means. within: of Blocks.full_within_reach."""
    with torch.autocast(q.device.type, enabled=False):
        grouped = q.to(means.dtype).unflatten(1, (means.shape[1], -1))
        scores = _scores(grouped, means, blocks, rows, within).flatten(1, 2)
        if slopes is not None:
            scores = scores - slopes.to(means.dtype)[:, None, None] * blocks.distance_to_blocks(rows)[:, None]
        p = entmax(scores.masked_fill(~blocks.visible(rows)[:, None], -torch.inf), alpha[:, None, None])
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
