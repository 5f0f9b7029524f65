"""DeepSeek Sparse Attention (DeepSeek-V3.2-Exp): exact attention to the tokens that an indexer chooses."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from kernels.block_sparse.attention import runs_on_triton
from kernels.lightning_indexer.indexer import chosen_attention
from model.config import ModelConfig
from model.dsa.indexer import LightningIndexer, chosen_block_mask, select_tokens
from model.dsa.loss import index_loss
from model.dsa.tokens import Tokens, cached_tokens, packed_tokens
from model.kv_cache import Extension, LayerCache
from model.rotary import rotary_tables
from model.sparse_attention import SparseAttention
from model.visible_attention import attend_flex, attend_masked, block_mask_of_view, uses_flex


@dataclass(frozen=True)
class DSAMetadata:
    """What all layers of one forward pass share. rotary: cos and sin of the indexer's channels, None where positions
    are not rotary. flex: whether kernels choose, attend and learn, FlexAttention where ours do not attend. dense: its
    block mask of all that is visible, in "warmup"."""

    tokens: Tokens
    rotary: tuple[Tensor, Tensor] | None
    flex: bool
    dense: BlockMask | None


class DeepSeekSparseAttention(SparseAttention):
    """What attends in the layers of kind "dsa": softmax over the keys that the indexer chooses for each query, one set
    for all heads, with the layer's own q, k, v. In training the indexer's loss is added (SparseAttention).

    Under nape and nope the indexer has no positions: ALiBi weighs what is chosen, not what to choose.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        assert config.attention.dsa is not None
        self.config = config.attention.dsa
        self.indexer = LightningIndexer(config, layer not in config.nope_layers)

    @staticmethod
    def metadata(
        config: ModelConfig,
        n_tokens: int,
        cu_seqlens: Tensor | None,
        max_seqlen: int,
        device: torch.device,
        number: Tensor | None = None,
    ) -> DSAMetadata:
        return _shared(config, packed_tokens(n_tokens, cu_seqlens, max_seqlen, device))

    @staticmethod
    def cached_metadata(config: ModelConfig, extension: Extension) -> DSAMetadata:
        return _shared(config, cached_tokens(extension))

    @torch.compiler.disable  # what is chosen decides on masks; FlexAttention is compiled by itself
    def forward(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        metadata: DSAMetadata,
        slopes: Tensor | None,
        cache: LayerCache | None = None,
        alpha: Tensor | None = None,
    ) -> Tensor:
        tokens, backend = metadata.tokens, "auto" if metadata.flex else "torch"
        index = self.indexer(x, metadata.rotary, v.dtype)
        if cache is not None:
            index = index._replace(k=cache.append_extra(index.k))
        chosen = block_mask = None
        if self.config.is_sparse:
            chosen = select_tokens(index, tokens, self.config.select_tokens, backend)
        if self.has_auxiliary:
            self.add_auxiliary(index_loss(index, q, k, tokens, slopes, chosen, backend))
        if chosen is not None and metadata.flex and runs_on_triton(q):
            return chosen_attention(q, k, v, tokens.first_key, tokens.own_key, chosen, alibi_slopes=slopes)
        view = tokens.view(slopes, chosen)
        if not metadata.flex:
            return attend_masked(q, k, v, view)
        block_mask = metadata.dense if chosen is None else chosen_block_mask(chosen, view, tokens.n_keys)
        assert block_mask is not None
        return attend_flex(q, k, v, view, block_mask)


def _shared(config: ModelConfig, tokens: Tokens) -> DSAMetadata:
    assert config.attention.dsa is not None
    n_queries, device = tokens.n_queries, tokens.own_key.device
    rotary = dense = None
    if config.positions == "rope":
        position, half = tokens.position[:, None], config.attention.dsa.index_dim // 2
        rotary = rotary_tables(position, replace(config, head_dim=half), position.max())  # [b or 1, 1, n, dim / 4]
    flex = uses_flex(device, n_queries, tokens.n_keys)
    if flex and not config.attention.dsa.is_sparse:
        dense = block_mask_of_view(tokens.view_of(tokens.visible_keys(), None), tokens.n_keys)
    return DSAMetadata(tokens, rotary, flex, dense)
