"""What the forward pass keeps for backward: everything, or of each block its input, on the device or in CPU memory, and
what is expensive to compute again."""

import functools
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from model.transformer import Block

ActivationCheckpointing = Literal["none", "selective", "full", "offload"]
SMALL_ELEMENTS = 2**18  # so few are not worth another piece
COPIES_UNDER_WAY = 2  # of blocks' inputs, which are on the device that long


def tile_feed_forward(blocks: list[Block], tokens: int) -> None:
    """Compute each block's feed-forward layer `tokens` tokens at a time."""
    for block in blocks:
        block.feed_forward.tile_tokens = tokens


class KeepOnHost(saved_tensors_hooks):
    """Within this context, tensors of the residual stream that are saved for backward wait for it in CPU memory.

    From CUDA they travel to pinned memory on a stream of their own, beside the computation, and back when backward asks
    for them. With checkpointed blocks these are the blocks' inputs (and the last norm's): what is left of activations.

    Args:
        shape: of the residual stream, (B, T, C). Other saved tensors stay where they are.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(self._pack, self._unpack)
        self.shape = shape
        self._leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._release(0)

    def _pack(self, x: Tensor) -> Any:
        if x.shape != self.shape or not x.is_floating_point():
            return x
        flat = x.detach().reshape(-1)
        host = [torch.empty(n, dtype=x.dtype, pin_memory=x.is_cuda) for n in pinned_sizes(flat.numel())]
        if not x.is_cuda:
            _copy(flat.split(_sizes(host)), host)
            return x.device, host, None
        self._release(COPIES_UNDER_WAY - 1)
        stream = copy_stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            _copy(flat.split(_sizes(host)), host)
            copied = stream.record_event()
        self._leaving.append((flat, copied))
        return x.device, host, copied

    def _release(self, remaining: int) -> None:
        """Give the memory of the oldest copies back, to the work that is queued behind them. (record_stream would keep
        it until a copy has ended, and the host, which is blocks ahead of the GPU, would take new memory for each.)"""
        while len(self._leaving) > remaining:
            flat, copied = self._leaving.popleft()
            torch.cuda.current_stream(flat.device).wait_event(copied)

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, host, copied = packed
        if copied is not None:
            torch.cuda.current_stream(device).wait_event(copied)
        x = torch.empty(self.shape, dtype=host[0].dtype, device=device)
        _copy(host, x.view(-1).split(_sizes(host)))
        return x


def pinned_sizes(elements: int) -> list[int]:
    """Numbers of elements that add up to `elements`, powers of two but for a small last one: torch rounds pinned memory
    up to a power of two of bytes, up to twice what a block's input takes."""
    sizes = []
    while elements > SMALL_ELEMENTS:
        sizes.append(1 << (elements.bit_length() - 1))
        elements -= sizes[-1]
    return [*sizes, elements] if elements else sizes


def _sizes(pieces: Sequence[Tensor]) -> list[int]:
    return [piece.numel() for piece in pieces]


def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source, non_blocking=True)


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
