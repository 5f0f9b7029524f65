"""What tests of the kernels' operators share: tracing, recomputation, CUDA graphs, derivatives that there are not."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

WRAPPERS = [
    pytest.param(lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"), id="compiled"),
    pytest.param(lambda f: lambda *x, **o: checkpoint(f, *x, use_reentrant=False, **o), id="checkpointed"),
]


def check_same_bits(wrap: Callable[..., Any], attend: Callable[..., Tensor], run: Callable[..., Any]) -> None:
    """wrap: of WRAPPERS. run: gives results of what it is given, `attend` as it is or wrapped."""
    torch._dynamo.reset()
    for ours, plain in zip(run(wrap(attend)), run(attend), strict=True):
        assert torch.equal(ours, plain)


def check_cuda_graph(step: Callable[[], Sequence[Tensor]], redraw: Callable[[int], object]) -> None:
    """A captured step gives what one that is run gives, on the numbers that redraw(seed) puts into its tensors."""
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
            redraw(seed)
        graph.replay()
        for ours, plain in zip(captured, step(), strict=True):
            assert torch.equal(ours, plain)


def check_second_derivatives_are_refused(attend: Callable[[Tensor], Tensor], q: Tensor) -> None:
    q = q.detach().requires_grad_()
    out = attend(q)
    with pytest.raises(RuntimeError, match="differentiable once by this backend"):
        (gradient,) = torch.autograd.grad(out.norm(), q, create_graph=True)
        torch.autograd.grad((gradient**2).sum(), q)


def check_transforms_are_refused(
    attend: Callable[[Tensor], Tensor], q: Tensor, way_out: str = "take backend='torch'"
) -> None:
    with pytest.raises(NotImplementedError, match=way_out):
        torch.func.grad(lambda x: attend(x).sum())(q.detach())
