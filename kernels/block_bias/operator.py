"""The Triton kernels as registered operators: shapes for tracing, autograd."""

import torch
from torch import Tensor

from kernels.block_bias.launches import attend, differentiate
from kernels.common.backends import operator_name
from kernels.common.derivatives import once
from kernels.common.launching import unit_stride

NAME = operator_name("block_bias_triton")
attention_operator = torch.library.custom_op(NAME, attend, mutates_args=())
backward_operator = torch.library.custom_op(f"{NAME}_backward", differentiate, mutates_args=())


@attention_operator.register_fake
def _(q, *_):
    return torch.empty_like(unit_stride(q)), q.new_empty(q.shape[:3], dtype=torch.float32)


@backward_operator.register_fake
def _(grad, q, k, v, bias, *_):
    return *(torch.empty_like(unit_stride(x)) for x in (q, k, v)), bias.new_empty(bias.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.block_size, ctx.scale = inputs
    q, k, v, bias, first_key, own_key, slopes = tensors
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, bias, *output, first_key, own_key, slopes)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad: Tensor | None, _):
    if grad is None:
        return (None,) * 9
    saved = ctx.saved_tensors
    with torch.no_grad():
        gradients = backward_operator(grad, *saved, ctx.block_size, ctx.scale)
    return *once(gradients, grad, *saved[:4]), *(None,) * 5


torch.library.register_autograd(NAME, _gradients, setup_context=_setup_context)
