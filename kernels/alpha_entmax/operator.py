"""The Triton kernels as one registered operator: shapes for tracing, autograd."""

from typing import Any

import torch
from torch import Tensor

from kernels.alpha_entmax.launches import backward, forward
from kernels.alpha_entmax.results import ForwardResults, forward_outputs
from kernels.common.backends import operator_name
from kernels.common.derivatives import once
from kernels.common.launching import unit_stride

PLAIN_TENSORS = (Tensor, torch.nn.Parameter)

entmax_attention_triton = torch.library.custom_op(operator_name("entmax_triton"), forward, mutates_args=())
backward_operator = torch.library.custom_op(operator_name("entmax_triton_backward"), backward, mutates_args=())


@entmax_attention_triton.register_fake
def _(q, k, v, alpha, scale, power, causal, cu_seqlens, kv_lens, alibi_slopes, window, gradient, stats, skip_far):
    return forward_outputs(unit_stride(q), k, causal, cu_seqlens, kv_lens, gradient, stats)


@backward_operator.register_fake
def _(grad, q, k, v, alpha, *_):
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), alpha.new_empty(alpha.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, alpha, scale, power, _, _, _, alibi_slopes, _, gradient, _, _ = inputs
    kept = ForwardResults(*output)
    ctx.save_for_backward(
        q,
        k,
        v,
        alpha,
        kept.out,
        kept.tau,
        kept.bits,
        kept.key_bits,
        kept.row_bits,
        kept.sparse,
        kept.rows,
        kept.blocks,
        alibi_slopes,
    )
    ctx.scale, ctx.power, ctx.gradient = scale, power, gradient
    ctx.mark_non_differentiable(*kept[1:])
    ctx.set_materialize_grads(False)  # or zeros are made for what has no gradient


def _gradients(run_backward, ctx, grad):
    if not ctx.gradient:
        raise RuntimeError("entmax_triton was called with gradient=False, so it kept nothing to differentiate with")
    *saved, alibi_slopes = ctx.saved_tensors
    with torch.no_grad():
        gradients = run_backward(grad, *saved, ctx.scale, ctx.power, alibi_slopes, ctx.needs_input_grad[3])
    return *once(gradients, grad, *saved[:4]), *(None,) * 10


torch.library.register_autograd(
    operator_name("entmax_triton"),
    lambda ctx, grad, *_: _gradients(backward_operator, ctx, grad),
    setup_context=_setup_context,
)


class _Eager(torch.autograd.Function):
    """The operator without the dispatcher's layers, which cost the host 0.4 ms for forward and backward."""

    @staticmethod
    def forward(ctx, *inputs):
        output = forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, grad, *_):
        return _gradients(backward, ctx, grad)


def intercepted(*tensors: Tensor) -> bool:
    """Whether something traces or intercepts operators: torch.compile, dispatch modes, tensor subclasses."""
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return traced or any(type(x) not in PLAIN_TENSORS for x in tensors)


def run_attention(*inputs: Any) -> ForwardResults:
    """entmax_attention_triton with all its arguments by position: as the registered operator where something intercepts
    it, directly elsewhere."""
    operator = entmax_attention_triton if intercepted(*inputs[:4]) else _Eager.apply
    return ForwardResults(*operator(*inputs))
