"""Alpha-entmax attention. Torch and triton only: no nn.Module, no configuration."""

from kernels.attention import entmax_attention
from kernels.rowwise import entmax
from kernels.stats import AttentionStats

__all__ = ["AttentionStats", "entmax", "entmax_attention"]
