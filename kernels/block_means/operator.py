"""The Triton kernels as registered operators: shapes for tracing, autograd."""

import torch
from torch import Tensor

from kernels.block_means.launches import differentiate, score
from kernels.common.backends import operator_name
from kernels.common.derivatives import once
from kernels.common.launching import unit_stride

NAME = operator_name("block_means_triton")
scores_operator = torch.library.custom_op(NAME, score, mutates_args=())
backward_operator = torch.library.custom_op(f"{NAME}_backward", differentiate, mutates_args=())


@scores_operator.register_fake
def _(q, k, first_key, own_key, block_start, block_ends, alibi_slopes, block_size, n_blocks, scale):
    return q.new_empty(*q.shape[:3], n_blocks, dtype=torch.float32)


@backward_operator.register_fake
def _(grad, q, k, *_):
    return torch.empty_like(unit_stride(q)), torch.empty_like(unit_stride(k))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.block_size, _, ctx.scale = inputs
    ctx.save_for_backward(*tensors[:-1])  # slopes add what has no gradient
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad: Tensor | None):
    if grad is None:
        return (None,) * 10
    saved = ctx.saved_tensors
    with torch.no_grad():
        gradients = backward_operator(grad, *saved, ctx.block_size, ctx.scale)
    return *once(gradients, grad, *saved[:2]), *(None,) * 8


torch.library.register_autograd(NAME, _gradients, setup_context=_setup_context)
