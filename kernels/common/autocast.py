"""Autocast and attention: operands come in the dtype that is wanted, and results are float32 where that is promised."""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def outside_autocast(function: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """Autocast would round float32 scores to 16 bits, in forward and not in backward, whose scores then exceed the
    thresholds that forward has found."""

    @wraps(function)
    def wrapped(first: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args, **kwargs)

    return wrapped
