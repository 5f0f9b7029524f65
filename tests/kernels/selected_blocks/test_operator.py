"""The Triton kernels as an operator: tracing, recomputation, CUDA graphs, derivatives that there are not."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import selected_block_attention
from kernels.selected_blocks import tuning
from kernels.selected_blocks.operator import attention_operator
from tests.kernels.helpers import DEVICE, draw, needs_cuda, needs_triton
from tests.kernels.operators import (
    WRAPPERS,
    check_cuda_graph,
    check_same_bits,
    check_second_derivatives_are_refused,
    check_transforms_are_refused,
)
from tests.kernels.selected_blocks.inputs import SHAPES, Shape, results

pytestmark = needs_triton
SHAPE = SHAPES["alibi"]


def attend(q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, own_key: Tensor) -> Tensor:
    return selected_block_attention(q, k, v, first_key, own_key, backend="triton", **SHAPE.options)


def test_registered_operator_is_sound() -> None:
    shape = Shape(9, 9, slopes=(1.0, 0.5, 0.0, 0.02), block_size=4)
    q, k, v, _ = (x.requires_grad_() for x in shape.tensors(torch.float32))
    slopes = torch.tensor(shape.slopes, device=DEVICE)
    torch.library.opcheck(attention_operator, (q, k, v, *shape.selection(), slopes, 4, 3, 0.25))


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_same_bits_where_it_is(wrap: Any) -> None:
    inputs, selection = SHAPE.tensors(torch.float32), SHAPE.selection()
    check_same_bits(wrap, attend, lambda function: results(function, inputs, torch.float32, *selection))


@needs_cuda
@pytest.mark.parametrize("few", [0, 10**9])
def test_cuda_graph_equals_eager(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists are made on the device, which nobody asks."""
    monkeypatch.setattr(tuning, "FEW_QUERIES", few)
    shape = Shape(700, 700, count=5, block_size=64, head_dim=64)
    inputs, (first, own) = shape.tensors(torch.bfloat16), shape.selection()
    q, k, v, grad = (x.requires_grad_() for x in inputs)

    def step() -> tuple[Tensor, ...]:
        out = selected_block_attention(q, k, v, first, own, block_size=64)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), grad.detach())

    def redraw(seed: int) -> None:
        for i, x in enumerate((q, k, v, grad)):
            x.copy_(draw(*x.shape, seed=seed + i, dtype=x.dtype))
        first.copy_(shape.selection(seed)[0])

    check_cuda_graph(step, redraw)


@pytest.mark.parametrize("check", [check_second_derivatives_are_refused, check_transforms_are_refused])
def test_what_is_refused(check: Any) -> None:
    (q, k, v, _), selection = Shape(5, 5).tensors(torch.float32), Shape(5, 5).selection()
    check(lambda x: selected_block_attention(x, k, v, *selection, block_size=16, backend="triton"), q)
