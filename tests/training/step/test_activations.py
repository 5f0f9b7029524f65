"""What waits in CPU memory for the backward pass."""

import pytest
import torch
from torch import nn

from training.step import activations
from training.step.activations import KeepOnHost, pinned_sizes

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]


@pytest.mark.parametrize("elements", [0, 1, 7, 2**18, 2**18 + 1, 3 * 2**28, 655360 * 2048, 12345 * 2048])
def test_pinned_memory_is_not_rounded_up_much(elements: int) -> None:
    sizes = pinned_sizes(elements)
    assert sum(sizes) == elements and min(sizes, default=1) > 0
    taken = sum(1 << (size - 1).bit_length() for size in sizes)  # as torch's pinned allocator gives it out
    assert taken - elements <= activations.SMALL_ELEMENTS


@pytest.mark.parametrize("device", DEVICES)
def test_what_comes_back_is_what_went(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several layers, so that pinned memory is used again while copies of it are under way; pieces of several sizes."""
    monkeypatch.setattr(activations, "SMALL_ELEMENTS", 8)
    torch.manual_seed(0)
    x = torch.randn(1, 1001, 37, device=device, requires_grad=True)
    layers = [nn.Linear(37, 37, device=device) for _ in range(6)]

    def gradients(hooks: KeepOnHost | torch.enable_grad) -> list[torch.Tensor]:
        with hooks:
            y = x
            for layer in layers:
                y = y + layer(y).sin()
        return list(torch.autograd.grad(y.square().mean(), [x, *(p for layer in layers for p in layer.parameters())]))

    packed = []

    class Counted(KeepOnHost):
        def _pack(self, x: torch.Tensor) -> object:
            packed.append(super()._pack(x))
            return packed[-1]

    found, expected = gradients(Counted(tuple(x.shape))), gradients(torch.enable_grad())
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    pieces = [host for _, host, _ in (one for one in packed if isinstance(one, tuple))]
    assert len(pieces) >= 6 and all(len(host) == len(pinned_sizes(x.numel())) > 5 for host in pieces)
