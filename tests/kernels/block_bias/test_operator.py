"""The Triton kernels as an operator: tracing, recomputation, CUDA graphs, derivatives that there are not."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import block_bias_attention
from kernels.block_bias.operator import attention_operator
from tests.kernels.block_bias.inputs import SHAPES, Shape, results
from tests.kernels.helpers import DEVICE, needs_cuda, needs_triton

pytestmark = needs_triton
SHAPE = SHAPES["alibi documents"]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, first_key: Tensor, own_key: Tensor) -> Tensor:
    return block_bias_attention(q, k, v, bias, first_key, own_key, backend="triton", **SHAPE.options)


def test_registered_operator_is_sound() -> None:
    shape = Shape(9, 9, slopes=(1.0, 0.5, 0.0, 0.02), block_size=4, live=0.8)
    q, k, v, bias, _ = (x.nan_to_num(0, neginf=-torch.inf).requires_grad_() for x in shape.tensors(torch.float32))
    slopes = torch.tensor(shape.slopes, device=DEVICE)
    torch.library.opcheck(attention_operator, (q, k, v, bias, *shape.positions(), slopes, 4, 0.25))


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda *x: torch.compile(attend, fullgraph=True, backend="aot_eager")(*x), id="compiled"),
        pytest.param(lambda *x: checkpoint(attend, *x, use_reentrant=False), id="checkpointed"),
    ],
)
def test_same_bits_where_it_is(function: Any) -> None:
    torch._dynamo.reset()
    inputs, positions = SHAPE.tensors(torch.float32), SHAPE.positions()
    expected = results(attend, inputs, torch.float32, *positions)
    for ours, plain in zip(results(function, inputs, torch.float32, *positions), expected, strict=True):
        assert torch.equal(ours, plain)


@needs_cuda
def test_cuda_graph_equals_eager() -> None:
    """Lists are made on the device, which nobody asks."""
    shape = Shape(700, 700, block_size=64, head_dim=64, documents=(300, 400))
    *tensors, grad = shape.tensors(torch.bfloat16)
    leaves, positions = [x.requires_grad_() for x in tensors], shape.positions()

    def step() -> tuple[Tensor, ...]:
        out = block_bias_attention(*leaves, *positions, block_size=64)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (10, 20):
        with torch.no_grad():
            for x, other in zip([*leaves, grad], shape.tensors(torch.bfloat16, seed), strict=True):
                x.copy_(other)
        graph.replay()
        for ours, plain in zip(captured, step(), strict=True):
            assert torch.equal(ours, plain)


def test_second_derivatives_are_refused() -> None:
    shape = Shape(5, 5, live=1.0)
    q, k, v, bias, _ = shape.tensors(torch.float32)
    out = block_bias_attention(
        q.requires_grad_(), k, v, bias, *shape.positions(), block_size=16, backend="triton"
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="differentiable once by this backend"):
        (gradient,) = torch.autograd.grad(out.norm(), q, create_graph=True)
        torch.autograd.grad((gradient**2).sum(), q)


def test_transforms_are_refused() -> None:
    shape = Shape(5, 5)
    q, k, v, bias, _ = shape.tensors(torch.float32)

    def loss(q: Tensor) -> Tensor:
        return block_bias_attention(
            q, k, v, bias, *shape.positions(), block_size=16, backend="triton"
        ).sum()  # fmt: skip

    with pytest.raises(NotImplementedError, match="take backend='torch'"):
        torch.func.grad(loss)(q)
