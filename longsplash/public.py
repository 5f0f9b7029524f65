"""The names of `longsplash`, which imports this where the first of them is asked for."""

from kernels import block_sparse_softmax_attention as block_sparse_attention
from kernels import entmax, entmax_attention
from longsplash.models import add_alpha, load_alpha
from longsplash.registering import register

__all__ = ["add_alpha", "block_sparse_attention", "entmax", "entmax_attention", "load_alpha", "register"]
