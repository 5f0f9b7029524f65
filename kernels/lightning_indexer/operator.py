"""The Triton kernels as registered operators: shapes for tracing, autograd of the loss."""

import torch
from torch import Tensor

from kernels.common.backends import operator_name
from kernels.common.derivatives import once
from kernels.lightning_indexer.launches import differentiate_loss, select

NAME = operator_name("indexer_loss_triton")
loss_operator = torch.library.custom_op(NAME, differentiate_loss, mutates_args=())
select_operator = torch.library.custom_op(operator_name("indexer_select_triton"), select, mutates_args=())


@loss_operator.register_fake
def _(index_q, index_k, weights, *_):
    gradients = (x.new_empty(x.shape, dtype=torch.float32) for x in (index_q, index_k, weights))
    return index_q.new_empty((), dtype=torch.float32), *gradients


@select_operator.register_fake
def _(index_q, index_k, *_):
    shape = (index_q.shape[0], index_q.shape[2], (index_k.shape[1] + 7) // 8)
    return index_q.new_empty(shape, dtype=torch.uint8)


def _setup_context(ctx, inputs, output):
    _, *gradients = output
    ctx.dtypes = [x.dtype for x in inputs[:3]]
    ctx.mark_non_differentiable(*gradients)
    ctx.save_for_backward(*gradients)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad: Tensor | None, *_):
    if grad is None:
        return (None,) * 10
    with torch.no_grad():
        found = tuple((grad * x).to(dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
    return *once(found, grad), *(None,) * 7


torch.library.register_autograd(NAME, _gradients, setup_context=_setup_context)
