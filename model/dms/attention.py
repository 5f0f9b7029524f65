"""Dynamic Memory Sparsification (arXiv 2506.05345): softmax attention to the tokens that each KV head has not evicted.

The paper's loss is the Kullback-Leibler divergence from the frozen model that one starts from, and what asks for
eviction: model.distill of train.py gives the first, `add_auxiliary` the second.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from model.block_masks import TILE, block_mask_of_tiles
from model.config import ModelConfig
from model.dms.cache import ForgettingKeys
from model.dms.eviction import EvictionLogits, logistic_noise
from model.dms.tokens import DelayedKeys
from model.kv_cache import Extension, LayerCache
from model.sparse_attention import SparseAttention
from model.token_positions import TokenPositions, cached_positions, packed_positions
from model.visible_attention import attend_flex, attend_masked, block_mask_of_view, uses_flex

TEMPERATURE = 0.1  # of Gumbel-sigmoid


class DynamicMemorySparsification(SparseAttention):
    """What attends in the layers of kind "dms".

    The logit z of a token (EvictionLogits) decides on the token before it, of the same document: the last one is never
    evicted. A query sees keys at a distance of at most `window` in any case, others as these are decided on.

    Training: y = (z + logistic noise) / TEMPERATURE, and keys beyond the window have log(1 - sigmoid(y)) added to
    their scores, through which W learns what may be lost; the share that y > 0 evicts goes to `add_auxiliary`, with
    sigmoid(y)'s gradient (straight-through). Elsewhere there is no noise: z > 0 evicts.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.layer = layer
        self.eviction = EvictionLogits(config)

    @staticmethod
    def metadata(
        config: ModelConfig,
        n_tokens: int,
        cu_seqlens: Tensor | None,
        max_seqlen: int,
        device: torch.device,
        number: Tensor | None = None,
    ) -> DelayedKeys:
        return _delayed(config, packed_positions(n_tokens, cu_seqlens, max_seqlen, device), number)

    @staticmethod
    def cached_metadata(config: ModelConfig, extension: Extension) -> DelayedKeys:
        return _delayed(config, cached_positions(extension), None)

    @torch.compiler.disable  # what is evicted decides on masks; FlexAttention is compiled by itself
    def forward(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        metadata: DelayedKeys,
        slopes: Tensor | None,
        cache: LayerCache | ForgettingKeys | None = None,
        alpha: Tensor | None = None,
    ) -> Tensor:
        if isinstance(cache, ForgettingKeys):
            return cache.attend(q, k, v, self.eviction(x) > 0, slopes)
        if self.has_auxiliary:
            log_kept = self.log_kept(x, metadata).repeat_interleave(q.shape[1] // k.shape[1], 1)
            if not metadata.flex:
                return attend_masked(q, k, v, lambda learned: metadata.weighed_view(learned, slopes), log_kept)
            assert metadata.dense is not None
            return attend_flex(q, k, v, metadata.weighed_view(log_kept, slopes), metadata.dense)
        evicted = self.evicted(x, metadata, cache)
        view = metadata.kept_view(evicted.repeat_interleave(q.shape[1] // k.shape[1], 1), slopes)
        if not metadata.flex:
            return attend_masked(q, k, v, view)
        live = metadata.tiles(evicted, TILE).repeat_interleave(q.shape[1] // k.shape[1], 1)
        block_mask = block_mask_of_tiles(live, view.visible, metadata.n_queries, metadata.n_keys)
        return attend_flex(q, k, v, view, block_mask)

    def log_kept(self, x: Tensor, tokens: DelayedKeys) -> Tensor:
        """log(1 - a) of each key in float32 (float64 for such x), (B, G, keys), which is at most 0, while the share of
        tokens that are evicted goes to the loss."""
        z = self.eviction(x)
        noise = logistic_noise(tokens.number, self.layer, z.shape[1]).to(z.dtype)
        y = pad(((z + noise) / TEMPERATURE)[..., 1:], (0, 1))
        y = y.masked_fill(~tokens.decided, -torch.inf)
        a = y.sigmoid()
        self.add_auxiliary(((y > 0) + (a - a.detach())).mean(1).sum())
        return logsigmoid(-y)

    @torch.no_grad()
    def evicted(self, x: Tensor, tokens: DelayedKeys, cache: LayerCache | None = None) -> Tensor:
        """bool (B, G, keys), which keys no query beyond the window sees. cache: holds the decisions of tokens so far,
        and takes those of x."""
        decisions = (self.eviction(x) > 0).mT  # [B, n, G]
        if cache is not None:
            decisions = cache.append_extra(decisions.to(cache.extra.dtype)) != 0
        # what stands behind a row's last token, or a document's, is read by no query: each key here is in its window
        return pad(decisions[:, 1:].mT, (0, 1)) & tokens.decided


def _delayed(config: ModelConfig, tokens: TokenPositions, number: Tensor | None) -> DelayedKeys:
    assert config.attention.dms is not None
    device, n_queries = tokens.own_key.device, tokens.n_queries
    flex, dense = uses_flex(device, n_queries, tokens.n_keys), None
    if flex and torch.is_grad_enabled():
        dense = block_mask_of_view(tokens.view_of(tokens.visible_keys(), None), tokens.n_keys)
    number = tokens.position if number is None else number
    return DelayedKeys(**vars(tokens), window=config.attention.dms.window, number=number, flex=flex, dense=dense)
