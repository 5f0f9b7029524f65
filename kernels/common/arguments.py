"""What the public functions check of their arguments: each error is one line that names the argument, what was expected
and what came. Values of tensors are read on the CPU only: on CUDA that would synchronise."""

from numbers import Real
from typing import Any

import torch
from torch import Tensor


def check_tensor(name: str, x: Any) -> None:
    """Raises TypeError for what is no tensor, ValueError for sparse and nested ones."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {_kind(x)}")
    if x.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {x.layout}")


POSITIONS = (torch.int32, torch.int64)
LARGEST_BLOCK = 2**20  # keys; kernels' numbers of keys have 32 bits


def check_kind(name: str, x: Any, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    """Raises TypeError for what is no tensor, ValueError for one of another dtype or device."""
    check_tensor(name, x)
    if x.dtype not in dtypes or x.device != device:
        kinds = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} must be {kinds} on {device}, got {x.dtype} on {x.device}")


def check_positions(name: str, x: Any, batch: int, n_queries: int, device: torch.device) -> None:
    """Raises TypeError or ValueError for what is not int32 or int64 (B or 1, n) on the device."""
    check_kind(name, x, POSITIONS, device)
    if x.shape not in ((batch, n_queries), (1, n_queries)):
        rows = "1" if batch == 1 else f"{batch} or 1"
        raise ValueError(f"{name} must be ({rows}, {n_queries}), got {tuple(x.shape)}")


def check_seen(first_key: Tensor, own_key: Tensor, n_keys: int) -> None:
    """Raises ValueError for queries that see keys which there are not; values are read on the CPU only."""
    if not readable(own_key) or own_key.numel() == 0:
        return
    if int(first_key.min()) < 0:
        raise ValueError(f"first_key must be at least 0, got {int(first_key.min())}")
    if int(own_key.max()) >= n_keys:
        raise ValueError(f"own_key must lie below the number of keys, {n_keys}, got {int(own_key.max())}")


def check_block_size(value: Any) -> None:
    check_integer("block_size", value)
    if not 1 <= value <= LARGEST_BLOCK:
        raise ValueError(f"block_size must lie in 1 ... {LARGEST_BLOCK}, got {value}")


def check_flag(name: str, x: Any) -> None:
    if not isinstance(x, bool):
        raise TypeError(f"{name} must be True or False, got {_kind(x)}")


def check_number(name: str, x: Any) -> None:
    """Raises TypeError for what is no real number; True and False are none."""
    if isinstance(x, bool) or not isinstance(x, (int, float, Real)):
        raise TypeError(f"{name} must be a number, got {_kind(x)}")


def check_integer(name: str, x: Any) -> None:
    if isinstance(x, bool) or not (isinstance(x, (int, torch.SymInt)) or hasattr(x, "__index__")):
        raise TypeError(f"{name} must be an integer, got {_kind(x)}")


def check_slopes(alibi_slopes: Any, heads: int, device: torch.device) -> None:
    if alibi_slopes is None:
        return
    check_tensor("alibi_slopes", alibi_slopes)
    if alibi_slopes.shape != (heads,):
        raise ValueError(f"alibi_slopes must be ({heads},), one per query head, got {tuple(alibi_slopes.shape)}")
    if not alibi_slopes.is_floating_point() or alibi_slopes.device != device:
        raise ValueError(
            f"alibi_slopes must be floating point on {device}, got {alibi_slopes.dtype} on {alibi_slopes.device}"
        )
    if alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError("alibi_slopes must not require grad, attention has no gradient for them: pass .detach()")
    if readable(alibi_slopes) and not bool(((alibi_slopes >= 0) & (alibi_slopes < torch.inf)).all()):
        raise ValueError(f"alibi_slopes must be finite and at least 0, got {alibi_slopes.tolist()}")


def readable(x: Tensor) -> bool:
    """Whether values may be looked at: on the CPU, outside compilation."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _kind(x: Any) -> str:
    text = " ".join(repr(x).split())
    return f"{type(x).__name__} {text[:40]}{'...' if len(text) > 40 else ''}"


# float32 rounds u = max(z - tau, 0), near 1, by 2 ** -24, and a weight u ** (1 / (alpha - 1)) by 1 / (alpha - 1) times
# that: at 1e-4 by 6e-4, about as 16-bit floats would. 16-bit inputs are computed in float32
NEAREST_TO_ONE = {torch.float32: 1e-4, torch.float64: 1e-12}


def check_alpha(alpha: Any, dtype: torch.dtype, softmax: str) -> None:
    """Kind and values of alpha, in (1, 2]; its shape is the caller's. dtype: computed with. softmax: the function for
    alpha 1. Raises TypeError or ValueError."""
    if not isinstance(alpha, Tensor):
        check_number("alpha", alpha)
        if not 1 < alpha <= 2:
            raise ValueError(f"alpha must lie in (1, 2], got {alpha}; for softmax use {softmax}")
        _check_distance(alpha, dtype)
        return
    if not alpha.is_floating_point():
        raise ValueError(f"alpha must be floating point, got {alpha.dtype}")
    if readable(alpha):
        outside = alpha.detach()[~((alpha > 1) & (alpha <= 2))]
        if outside.numel():
            raise ValueError(f"alpha must lie in (1, 2], got {outside.tolist()}; bound it, e.g. by a sigmoid")
        if alpha.numel():
            _check_distance(float(alpha.detach().min()), dtype)


def _check_distance(alpha: float, dtype: torch.dtype) -> None:
    """Raises ValueError for an alpha in (1, 2] that is nearer to 1 than the computing dtype resolves."""
    least = NEAREST_TO_ONE[dtype]
    if alpha - 1 < least * (1 - 1e-9):
        raise ValueError(
            f"alpha must be at least 1 + {least:.0e} where {dtype} is computed with, got {alpha!r}: nearer to 1 "
            "rounding spoils the weights; for softmax use scaled_dot_product_attention or torch.softmax"
        )
