"""Which implementation runs an operation: what "auto" means, and errors for what cannot run."""

import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import triton
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])
INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: kernels run on CPU tensors
# A wheel's copy of this module is longsplash.kernels.common.backends. Of two operators of one name torch keeps the last
# without a word: where a process imports a checkout and a wheel, one would run the other's code
NAMESPACE = "longsplash" if __name__.startswith("longsplash.") else "longsplash_checkout"


def operator_name(name: str) -> str:
    """The name that torch.library registers an operator of this package by."""
    return f"{NAMESPACE}::{name}"


def choose_backend(backend: str, choices: Sequence[str], x: Tensor, unsupported: str | None) -> str:
    """The backend to use: "auto" is "triton" on CUDA where it can, else "torch",
    with one warning on CUDA.

    unsupported: what of this call the Triton kernels cannot do, None where they can.

    Raises: ValueError if backend is none of the choices, or is "triton" where that cannot run.
    """
    if backend not in choices:
        raise ValueError(f"backend must be one of {', '.join(choices)}, got {backend!r}")
    if backend == "auto":
        if x.is_cuda and unsupported is not None:
            warn_of_slow_path(unsupported)
        return "triton" if x.is_cuda and unsupported is None else "torch"
    if backend == "triton":
        if unsupported is not None:
            raise ValueError(f"backend 'triton' {unsupported}; use backend='torch'")
        if not x.is_cuda and not INTERPRETED:
            raise ValueError(
                f"backend 'triton' needs CUDA tensors, got {x.device}; set TRITON_INTERPRET=1 before Python starts to "
                "interpret its kernels on the CPU, or use backend='torch'"
            )
    return backend


def constant(function: F) -> F:
    """The function, called once for each of its arguments (by position) as with functools.cache, and called, not
    traced, by torch.compile.

    torch._dynamo traces into functools.cache, whatever is said of it, and torch.compiler.assume_constant_result imports
    torch._dynamo, which takes more than a second of each `import longsplash`.
    """
    results: dict[tuple[Any, ...], Any] = {}

    @wraps(function)
    def once(*arguments: Any) -> Any:
        if arguments not in results:
            results[arguments] = function(*arguments)
        return results[arguments]

    once._dynamo_marked_constant = True  # type: ignore[attr-defined]
    once.cache_clear = results.clear  # type: ignore[attr-defined]
    return once  # type: ignore[return-value]


@constant
def warn_of_slow_path(unsupported: str) -> None:
    """Once a reason."""
    warnings.warn(
        f"backend 'auto' takes the slow PyTorch path on CUDA: the Triton one {unsupported}",
        RuntimeWarning,
        stacklevel=4,
    )
