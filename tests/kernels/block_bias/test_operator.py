"""The Triton kernels as an operator: tracing, recomputation, CUDA graphs, derivatives that there are not."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import block_bias_attention
from kernels.block_bias.operator import attention_operator
from tests.kernels.block_bias.inputs import SHAPES, Shape, results
from tests.kernels.helpers import DEVICE, needs_cuda, needs_triton
from tests.kernels.operators import (
    WRAPPERS,
    check_cuda_graph,
    check_same_bits,
    check_second_derivatives_are_refused,
    check_transforms_are_refused,
)

pytestmark = needs_triton
SHAPE = SHAPES["alibi documents"]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, first_key: Tensor, own_key: Tensor) -> Tensor:
    return block_bias_attention(q, k, v, bias, first_key, own_key, backend="triton", **SHAPE.options)


def test_registered_operator_is_sound() -> None:
    shape = Shape(9, 9, slopes=(1.0, 0.5, 0.0, 0.02), block_size=4, live=0.8)
    q, k, v, bias, _ = (x.nan_to_num(0, neginf=-torch.inf).requires_grad_() for x in shape.tensors(torch.float32))
    slopes = torch.tensor(shape.slopes, device=DEVICE)
    torch.library.opcheck(attention_operator, (q, k, v, bias, *shape.positions(), slopes, 4, 0.25))


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_same_bits_where_it_is(wrap: Any) -> None:
    inputs, positions = SHAPE.tensors(torch.float32), SHAPE.positions()
    check_same_bits(wrap, attend, lambda function: results(function, inputs, torch.float32, *positions))


@needs_cuda
def test_cuda_graph_equals_eager() -> None:
    """Lists are made on the device, which nobody asks."""
    shape = Shape(700, 700, block_size=64, head_dim=64, documents=(300, 400))
    *tensors, grad = shape.tensors(torch.bfloat16)
    leaves, positions = [x.requires_grad_() for x in tensors], shape.positions()

    def step() -> tuple[Tensor, ...]:
        out = block_bias_attention(*leaves, *positions, block_size=64)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    def redraw(seed: int) -> None:
        for x, other in zip([*leaves, grad], shape.tensors(torch.bfloat16, seed), strict=True):
            x.copy_(other)

    check_cuda_graph(step, redraw)


@pytest.mark.parametrize("check", [check_second_derivatives_are_refused, check_transforms_are_refused])
def test_what_is_refused(check: Any) -> None:
    shape = Shape(5, 5, live=1.0)
    q, k, v, bias, _ = shape.tensors(torch.float32)
    check(lambda x: block_bias_attention(x, k, v, bias, *shape.positions(), block_size=16, backend="triton"), q)
