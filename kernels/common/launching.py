"""What the launches of Triton kernels share: strides, padded sizes, precision of dots, the current device."""

import contextlib
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from kernels.common.backends import INTERPRETED
from kernels.common.tuning import LARGE_SHARED_MEMORY, shared_memory

P = ParamSpec("P")
R = TypeVar("R")


def bfloat16_as_float32(n_outputs: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Guards a launcher in Triton's interpreter, which multiplies the bits of bfloat16 as integers in tl.dot and cuts
    off where it should round (Triton 3.9): kernels get float32, and the launcher's first n_outputs results, those in
    its operands' dtype, are rounded to bfloat16. On the GPU the launcher is as it was."""

    def widened(x: Any) -> Any:
        return x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x

    def decorate(launcher: Callable[P, R]) -> Callable[P, R]:
        @wraps(launcher)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> Any:
            given = [*args, *kwargs.values()]
            if not any(isinstance(x, Tensor) and x.dtype == torch.bfloat16 for x in given):
                return launcher(*args, **kwargs)
            wide: Any = {name: widened(x) for name, x in kwargs.items()}
            results: Any = launcher(*map(widened, args), **wide)  # type: ignore[arg-type]
            if isinstance(results, Tensor):
                return results.bfloat16()
            return *(x.bfloat16() for x in results[:n_outputs]), *results[n_outputs:]

        return wrapped if INTERPRETED else launcher

    return decorate


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


def dot_precision(head_dim: int, dtype: torch.dtype, device: torch.device, enlarged: bool = False) -> str:
    """Precision of tl.dot. float32: three TF32 products, about float32's own accuracy, where their operands, each in
    two parts, fit on the chip, else plain float32 units, which compile slowly. enlarged: whether their errors are, by
    logarithms of small weights or differences of near ones; then plain units too."""
    if dtype != torch.float32:
        return "tf32"
    if enlarged:
        return "ieee"
    large = device.type == "cpu" or shared_memory(device) >= LARGE_SHARED_MEMORY
    return "tf32x3" if head_dim <= (128 if large else 64) else "ieee"


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
