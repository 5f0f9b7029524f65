"""The Triton kernels as a registered operator: shapes for tracing, autograd."""

import torch
from torch import Tensor

from kernels.common.backends import operator_name
from kernels.common.derivatives import once
from kernels.lightning_indexer.launches import differentiate_loss

NAME = operator_name("indexer_loss_triton")
loss_operator = torch.library.custom_op(NAME, differentiate_loss, mutates_args=())


@loss_operator.register_fake
def _(index_q, index_k, weights, *_):
    gradients = (x.new_empty(x.shape, dtype=torch.float32) for x in (index_q, index_k, weights))
    return index_q.new_empty((), dtype=torch.float32), *gradients


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
