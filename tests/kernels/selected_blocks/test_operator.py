"""The Triton kernels as an operator: tracing, recomputation, CUDA graphs, derivatives that there are not."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import selected_block_attention
from kernels.selected_blocks import tuning
from kernels.selected_blocks.operator import attention_operator
from tests.kernels.helpers import DEVICE, draw, needs_cuda, needs_triton
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


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda *x: torch.compile(attend, fullgraph=True, backend="aot_eager")(*x), id="compiled"),
        pytest.param(lambda *x: checkpoint(attend, *x, use_reentrant=False), id="checkpointed"),
    ],
)
def test_same_bits_where_it_is(function: Any) -> None:
    torch._dynamo.reset()
    inputs, selection = SHAPE.tensors(torch.float32), SHAPE.selection()
    expected = results(attend, inputs, torch.float32, *selection)
    for ours, plain in zip(results(function, inputs, torch.float32, *selection), expected, strict=True):
        assert torch.equal(ours, plain)


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
            for i, x in enumerate((q, k, v, grad)):
                x.copy_(draw(*x.shape, seed=seed + i, dtype=x.dtype))
            first.copy_(shape.selection(seed)[0])
        graph.replay()
        for ours, plain in zip(captured, step(), strict=True):
            assert torch.equal(ours, plain)


def test_second_derivatives_are_refused() -> None:
    inputs, selection = Shape(5, 5).tensors(torch.float32), Shape(5, 5).selection()
    q = inputs[0].requires_grad_()
    out = selected_block_attention(q, *inputs[1:3], *selection, block_size=16, backend="triton")
    with pytest.raises(RuntimeError, match="differentiable once by this backend"):
        (gradient,) = torch.autograd.grad(out.norm(), q, create_graph=True)
        torch.autograd.grad((gradient**2).sum(), q)


def test_transforms_are_refused() -> None:
    inputs, selection = Shape(5, 5).tensors(torch.float32), Shape(5, 5).selection()

    def loss(q: Tensor) -> Tensor:
        return selected_block_attention(q, *inputs[1:3], *selection, block_size=16, backend="triton").sum()

    with pytest.raises(NotImplementedError, match="take backend='torch'"):
        torch.func.grad(loss)(inputs[0])
