"""Alpha-entmax attention, softmax attention over blocks of keys or with a bias for each, scores of blocks. Torch and
triton only: no nn.Module, no configuration."""

from kernels.alpha_entmax.attention import entmax_attention
from kernels.alpha_entmax.rowwise import entmax
from kernels.block_bias.attention import block_bias_attention
from kernels.block_importance.attention import block_importance_scores
from kernels.block_means.attention import block_mean_scores
from kernels.block_sparse.attention import BlockSparseStats, block_sparse_softmax_attention
from kernels.block_sparse.reference import KEY_BLOCK, QUERY_BLOCK, block_maxima
from kernels.common.stats import AttentionStats
from kernels.selected_blocks.attention import selected_block_attention

__all__ = [
    "KEY_BLOCK",
    "QUERY_BLOCK",
    "AttentionStats",
    "BlockSparseStats",
    "block_bias_attention",
    "block_importance_scores",
    "block_maxima",
    "block_mean_scores",
    "block_sparse_softmax_attention",
    "entmax",
    "entmax_attention",
    "selected_block_attention",
]
