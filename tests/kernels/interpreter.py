"""Triton's interpreter, about twenty times faster: without this the kernels' tests would take most of an hour."""

from dataclasses import replace
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

PATCH_LANGUAGE = interpreter._patch_lang
BLOCK_TYPE, TENSOR, NUMPY_TYPE = tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype
BROADCAST = TritonSemantic.broadcast_impl_value
blocks: dict[tuple, dict[str, Any]] = {}  # attributes of types of tensors, by element and shape
tensors: dict[str, dict[str, Any]] = {}  # attributes of tensors that follow from the type, by its name
numpy_types: dict[str, np.dtype] = {}
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


def _block_type(self: Any, element_ty: Any, shape: Any) -> None:
    """As Triton's, which works out the same few types for each of a kernel's numbers."""
    sizes = [getattr(size, "value", size) for size in shape]
    key = (element_ty.name, *sizes, *map(type, sizes))  # 16.0 is 16, but no size
    if key not in blocks:
        BLOCK_TYPE(self, element_ty, shape)
        blocks[key] = dict(self.__dict__)
    self.__dict__.update(blocks[key], element_ty=element_ty)


def _tensor(self: Any, handle: Any, type: Any) -> None:
    if type.name not in tensors:
        TENSOR(self, handle, type)
        tensors[type.name] = {name: value for name, value in self.__dict__.items() if name != "handle"}
    self.__dict__.update(tensors[type.name], handle=handle, type=type, dtype=type.scalar)


def _numpy_type(type: Any) -> np.dtype:
    name = type.scalar.name
    if name not in numpy_types:
        numpy_types[name] = NUMPY_TYPE(type)
    return numpy_types[name]


def _broadcast(self: Any, lhs: Any, rhs: Any) -> tuple:
    """As Triton's, which compares shapes slowly."""
    left, right = lhs.type, rhs.type
    if left.is_block() and right.is_block() and list(left.shape) == list(right.shape):
        return lhs, rhs
    return BROADCAST(self, lhs, rhs)


def prepare() -> None:
    tl.block_type.__init__, tl.tensor.__init__ = _block_type, _tensor
    interpreter._get_np_dtype = _numpy_type
    TritonSemantic.broadcast_impl_value = _broadcast
    interpreter._patch_lang = _patch_language
    interpreter.ReduceOps.generic_reduce = _reduce
    interpreter.InterpretedFunction.__call__ = _call
    builder = interpreter.interpreter_builder  # int32 overflow needs lengths that no interpreted test has
    builder.options = replace(builder.options, sanitize_overflow=False)
