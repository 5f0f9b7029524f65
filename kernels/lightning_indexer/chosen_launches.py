"""Launches of attention over chosen keys, and its operators."""

from typing import Any

import torch
from torch import Tensor

from kernels.common.backends import operator_name
from kernels.common.derivatives import once
from kernels.common.launching import (
    bfloat16_as_float32,
    ceil_div,
    on_device,
    padded_head_dim,
    strides,
    unit_stride,
)
from kernels.lightning_indexer.chosen_passes import (
    attend_chosen,
    chosen_backward_keys,
    chosen_backward_queries,
    keep_finite,
)
from kernels.lightning_indexer.launches import AttentionOperands, Rows, options
from kernels.lightning_indexer.tuning import indexer_launch
from kernels.selected_blocks.backward import row_products

NAME = operator_name("chosen_attention_triton")
PRODUCT_ROWS = 32  # of grad * out that one program sums
COPIED_KEYS = 32  # of one program


@bfloat16_as_float32(n_outputs=1)
def attend(
    q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, own_key: Tensor, chosen: Tensor, alibi_slopes: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Arguments as in `chosen_attention`, where they are checked. Returns out (B, H, n, D) and log-sum-exps of scores,
    of base 2, float32 (B, H, n), 0 where a row sees nothing."""
    out = torch.empty_like(unit_stride(q))
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel() == 0 or k.shape[2] == 0:
        return out.zero_(), lse.zero_()
    k, v = _finite_keys(k, v, nan=True)
    operands, rows = AttentionOperands(q, k, alibi_slopes, scale), Rows(first_key, own_key, chosen)
    launch = indexer_launch("attend", operands.padded_dim, q.dtype, q.device)
    with on_device(q):
        attend_chosen[(ceil_div(q.shape[2], launch.rows), lse.shape[0] * lse.shape[1])](
            p_v=v, p_out=out, p_lse=lse, **strides("v", v), **strides("o", out),
            **operands.arguments, **rows.arguments, **options(launch),
        )  # fmt: skip
    return out, lse


@bfloat16_as_float32(n_outputs=3)
def differentiate(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, first_key: Tensor, own_key: Tensor,
    chosen: Tensor, alibi_slopes: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, from what `attend` took and gave and the gradient of its output."""
    grad, dq = unit_stride(grad), torch.empty_like(unit_stride(q))
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    k, v = _finite_keys(k, v, nan=False)  # what sees such a key has a log-sum-exp of NaN
    operands, rows = AttentionOperands(q, k, alibi_slopes, scale), Rows(first_key, own_key, chosen)
    delta = torch.empty_like(lse)
    launch = indexer_launch("attend backward", operands.padded_dim, q.dtype, q.device)
    shared: dict[str, Any] = dict(p_v=v, p_grad=grad, p_lse=lse, p_delta=delta, **strides("v", v), **strides("g", grad))
    shared |= operands.arguments | rows.arguments | options(launch)
    with on_device(q):
        row_products[(ceil_div(delta.numel(), PRODUCT_ROWS),)](
            p_a=grad, p_b=out, p_sums=delta, n_rows=delta.numel(), n_queries=q.shape[2], heads=q.shape[1],
            D=q.shape[3], BD=operands.padded_dim, BM=PRODUCT_ROWS, num_warps=4,
            **strides("a", grad), **strides("b", out),
        )  # fmt: skip
        chosen_backward_queries[(ceil_div(q.shape[2], launch.rows), q.shape[0] * q.shape[1])](
            p_dq=dq, **strides("o", dq), **shared
        )
        chosen_backward_keys[(ceil_div(k.shape[2], launch.keys), k.shape[0] * k.shape[1])](
            p_dk=dk, p_dv=dv, search_steps=q.shape[2].bit_length(), **shared
        )
    return dq, dk, dv


def _finite_keys(k: Tensor, v: Tensor, nan: bool) -> tuple[Tensor, Tensor]:
    k, v = unit_stride(k), unit_stride(v)
    copies = k.new_empty(k.shape), v.new_empty(v.shape)
    with on_device(k):
        keep_finite[(ceil_div(k.shape[2], COPIED_KEYS), k.shape[0] * k.shape[1])](
            p_k=k, p_v=v, p_k_out=copies[0], p_v_out=copies[1], groups=k.shape[1], n_keys=k.shape[2], D=k.shape[3],
            BD=padded_head_dim(k.shape[3]), BN=COPIED_KEYS, NAN=nan, num_warps=4, **strides("k", k), **strides("v", v),
        )  # fmt: skip
    return copies


attention_operator = torch.library.custom_op(NAME, attend, mutates_args=())
backward_operator = torch.library.custom_op(f"{NAME}_backward", differentiate, mutates_args=())


@attention_operator.register_fake
def _(q, *_):
    return torch.empty_like(unit_stride(q)), q.new_empty(q.shape[:3], dtype=torch.float32)


@backward_operator.register_fake
def _(grad, q, k, v, *_):
    return torch.empty_like(unit_stride(q)), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad: Tensor | None, _):
    if grad is None:
        return (None,) * 8
    saved = ctx.saved_tensors
    with torch.no_grad():
        gradients = backward_operator(grad, *saved, ctx.scale)
    return *once(gradients, grad, *saved[:3]), *(None,) * 5


torch.library.register_autograd(NAME, _gradients, setup_context=_setup_context)
