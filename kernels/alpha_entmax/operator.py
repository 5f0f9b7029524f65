"""The Triton kernels as registered operators: shapes for tracing, autograd.

Thresholds and weighted sum are two, so that activation checkpointing can keep the first one's results: recomputed, the
sum is the same to the bit and nothing is scanned or refined again.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.alpha_entmax.backward_launches import backward
from kernels.alpha_entmax.launches import find_thresholds, forward, weighted_sum
from kernels.alpha_entmax.results import Thresholds, WeightedSum, empty_sum, empty_thresholds
from kernels.common.backends import operator_name
from kernels.common.derivatives import once
from kernels.common.launching import unit_stride

PLAIN_TENSORS = (Tensor, torch.nn.Parameter)

thresholds_operator = torch.library.custom_op(
    operator_name("entmax_triton_thresholds"), find_thresholds, mutates_args=()
)
sum_operator = torch.library.custom_op(operator_name("entmax_triton_sum"), weighted_sum, mutates_args=())
backward_operator = torch.library.custom_op(operator_name("entmax_triton_backward"), backward, mutates_args=())


@thresholds_operator.register_fake
def _(q, k, alpha, scale, power, causal, cu_seqlens, kv_lens, alibi_slopes, window, gradient, stats, skip_far):
    return tuple(empty_thresholds(unit_stride(q), k, causal, cu_seqlens, kv_lens, gradient, stats))


@sum_operator.register_fake
def _(q, *arguments):
    return tuple(empty_sum(unit_stride(q), stats=arguments[-1]))


@backward_operator.register_fake
def _(grad, q, k, v, alpha, *_):
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), alpha.new_empty(alpha.shape)


def _keep(ctx, inputs, found: Thresholds, result: WeightedSum) -> None:
    """inputs: q, k, v, alpha, scale, power, alibi_slopes, gradient."""
    *tensors, ctx.scale, ctx.power, alibi_slopes, ctx.gradient = inputs
    lists = (found.bits, found.key_bits, found.row_bits, found.sparse, found.rows, found.blocks)
    ctx.save_for_backward(*tensors, result.out, result.tau, *lists, alibi_slopes)
    ctx.set_materialize_grads(False)  # or zeros are made for what has no gradient


def _gradients(run_backward, ctx, grad):
    """Of q, k, v and alpha."""
    if not ctx.gradient:
        raise RuntimeError("entmax attention was called with gradient=False: it kept nothing to differentiate with")
    *saved, alibi_slopes = ctx.saved_tensors
    with torch.no_grad():
        gradients = run_backward(grad, *saved, ctx.scale, ctx.power, alibi_slopes, ctx.needs_input_grad[3])
    return once(gradients, grad, *saved[:4])


def _setup_context(ctx, inputs, output):
    *tensors, scale, power, alibi_slopes, gradient, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    _keep(ctx, (*tensors[:4], scale, power, alibi_slopes, gradient), Thresholds(*tensors[4:]), WeightedSum(*output))


def _sum_gradients(ctx, grad, *_):
    return *_gradients(backward_operator, ctx, grad), *(None,) * (len(Thresholds._fields) + 5)


torch.library.register_autograd(operator_name("entmax_triton_sum"), _sum_gradients, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """Both operators without the dispatcher's layers, which cost the host 0.4 ms for forward and backward."""

    @staticmethod
    def forward(ctx, q, k, v, alpha, scale, power, causal, cu_seqlens, kv_lens, alibi_slopes, window, gradient, *more):
        visible = (causal, cu_seqlens, kv_lens, alibi_slopes, window)
        results = forward(q, k, v, alpha, scale, power, *visible, gradient, *more)
        result, found = WeightedSum(*results[:4]), Thresholds(*results[4:])
        _keep(ctx, (q, k, v, alpha, scale, power, alibi_slopes, gradient), found, result)
        ctx.mark_non_differentiable(*result[1:], found.passes)
        return *result, found.passes

    @staticmethod
    def backward(ctx, grad, *_):
        return *_gradients(backward, ctx, grad), *(None,) * 10


def intercepted(*tensors: Tensor) -> bool:
    """Whether something traces or intercepts operators: torch.compile, dispatch modes, tensor subclasses."""
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return traced or any(type(x) not in PLAIN_TENSORS for x in tensors)


def call_operators(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, scale: float, power: str, causal: bool, cu_seqlens: Tensor | None,
    kv_lens: Tensor | None, alibi_slopes: Tensor | None, window: int | None, gradient: bool, stats: bool,
    skip_far: bool,
) -> tuple[WeightedSum, Thresholds]:  # fmt: skip
    """Arguments as in `find_thresholds`. The sum's gradients are those of attention: thresholds have none."""
    visible = (causal, cu_seqlens, kv_lens, alibi_slopes, window)
    found = thresholds_operator(
        q.detach(), k.detach(), alpha.detach(), scale, power, *visible, gradient, stats, skip_far
    )
    return WeightedSum(*sum_operator(q, k, v, alpha, *found, scale, power, alibi_slopes, gradient, stats)), Thresholds(
        *found
    )


def run_attention(*inputs: Any) -> tuple[WeightedSum, Tensor]:
    """Arguments by position as in `call_operators`, which runs where something intercepts operators. Returns the sum
    and Thresholds.passes."""
    if intercepted(*inputs[:4]):
        result, found = call_operators(*inputs)
        return result, found.passes
    *result, passes = _Eager.apply(*inputs)
    return WeightedSum(*result), passes
