"""The Triton kernels as a registered operator: shapes for tracing."""

import torch

from kernels.block_importance.launches import rate
from kernels.common.backends import operator_name

importance_operator = torch.library.custom_op(operator_name("block_importance_triton"), rate, mutates_args=())


@importance_operator.register_fake
def _(q, k, first_key, position, alibi_slopes, compress_length, compress_stride, block_size, n_blocks, *_):
    return q.new_empty(q.shape[0], k.shape[1], q.shape[2], n_blocks, dtype=torch.float32)
