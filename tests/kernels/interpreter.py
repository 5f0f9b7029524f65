"""Triton's interpreter, about fifteen times faster: without this the kernels' tests would take most of an hour."""

from dataclasses import replace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

PATCH_LANGUAGE = interpreter._patch_lang
STEPS_AHEAD = 8  # more than any launch has stages


def _reduce(self: Any, values: tuple) -> list:
    """tl.reduce with any elementwise function, a slice of the axis at a time (instead of an element)."""

    def part(i: int) -> tuple:
        return tuple(self.to_tensor(np.take(x.handle.data, i, self.axis), x.dtype) for x in values)

    total = part(0)
    for i in range(1, values[0].shape[self.axis]):
        combined = self.combine_fn.fn(*total, *part(i))
        total = combined if isinstance(combined, tuple) else (combined,)
    if not self.keep_dims:
        return list(total)
    return [self.to_tensor(np.expand_dims(x.handle.data, self.axis), x.dtype) for x in total]


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A device function; the language, once patched for a launch, is not patched again for every call."""
    if any(module.full.__module__ != interpreter.__name__ for module in (tl, tl.core)):
        interpreter._patch_lang(self.fn)
    self.fn.__globals__["range"] = _checked_range
    return self.rewrite()(*args, **kwargs)


def _checked_range(*args: Any, step: Any = 1, **_: Any) -> range:
    """Fails for loops that would run ahead of themselves on a GPU: loads of later steps are issued early there, guarded
    by start + step < stop, which a start near the largest integer passes by overflow, whatever stop is. (A loop's own
    num_stages says nothing here: the interpreter's launches have one.)"""
    found = range(*args) if len(args) != 2 else range(*args, step)
    ahead = found.start + STEPS_AHEAD * found.step
    assert ahead < 2**31, f"a loop begins at {found.start}: a step of {found.step} ahead is beyond int32"
    return found


def _patch_language(fn: Any) -> Any:
    scope = PATCH_LANGUAGE(fn)
    scope.set_attr(tl, "range", _checked_range)
    fn.__globals__["range"] = _checked_range  # plain loops are pipelined too
    return scope


def prepare() -> None:
    interpreter._patch_lang = _patch_language
    interpreter.ReduceOps.generic_reduce = _reduce
    interpreter.InterpretedFunction.__call__ = _call
    builder = interpreter.interpreter_builder  # int32 overflow needs lengths that no interpreted test has
    builder.options = replace(builder.options, sanitize_overflow=False)
