"""What the launches of Triton kernels share: strides, padded sizes, precision of dots, the current device."""

import contextlib

import torch
from torch import Tensor


def ceil_div(a: int, b: int) -> int:
    """triton.cdiv, whose wrapper costs the host 10 microseconds a call."""
    return -(-a // b)


def padded_head_dim(head_dim: int) -> int:
    """The power of two, at least 16, that the tiles have."""
    return max(16, 1 << (head_dim - 1).bit_length())


def unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def describable(x: Tensor) -> bool:
    """Whether the tensor memory accelerator (TMA) can read x: an address and strides of whole 16 bytes."""
    unit = 16 // x.element_size()
    return x.data_ptr() % 16 == 0 and all(step > 0 and step % unit == 0 for step in x.stride()[:-1])


def strides(letter: str, x: Tensor) -> dict[str, int]:
    return {f"stride_{letter}{axis}": x.stride(i) for i, axis in enumerate("bht")}


def dot_precision(q: Tensor) -> str:
    """Of tl.dot. float32: three TF32 products, about float32's own accuracy, where their operands fit on the chip, else
    plain float32 units, which compile slowly."""
    if q.dtype != torch.float32:
        return "tf32"
    return "tf32x3" if q.shape[3] <= 128 else "ieee"


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
