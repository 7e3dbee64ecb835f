"""Floating point in triton's interpreter as devices have it: bfloat16 (which it multiplies as bit patterns) and float8.

Numbers are widened to float32, computed, and rounded to nearest, ties to even. What is not mended here refuses
bfloat16 instead of computing nonsense (functions such as exp take none by triton's own rules); kernels convert to
float32 right after they load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl
from triton.runtime import interpreter

METHODS = (
    "create_dot",
    "binary_op",
    "ternary_op",
    "cast_impl",
    "create_fp_to_fp",
    "create_fma",
)

FLOAT8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
"""Stored as bytes by the interpreter, by the dtype in which torch converts them."""

Numbers = npt.NDArray[Any]


def widened(bits: Numbers) -> npt.NDArray[np.float32]:
    """Return the float32 values of bfloat16 bit patterns (uint16)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: Numbers) -> npt.NDArray[np.uint16]:
    """Return the bit patterns of the nearest bfloat16 numbers, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    result: npt.NDArray[np.uint16] = np.where(np.isnan(values), np.uint16(0x7FC0), nearest)
    return result


def _is_bfloat16(handle: Any) -> bool:
    """Whether a handle holds bfloat16 numbers; of a comparison of such it holds booleans and says bfloat16 too."""
    return bool(handle.dtype.scalar == tl.bfloat16) and handle.data.dtype == np.uint16


def values_of(handle: Any) -> Numbers:
    """Return numbers that numpy can compute with."""
    if _is_bfloat16(handle):
        return widened(handle.data)
    if handle.dtype.scalar in FLOAT8:
        raw = torch.from_numpy(np.ascontiguousarray(handle.data))
        values: Numbers = raw.view(FLOAT8[handle.dtype.scalar]).float().numpy()
        return values
    data: Numbers = handle.data
    return data


def _stored(values: Numbers, dtype: Any) -> Any:
    """Return a handle of float32 values rounded to bfloat16 or float8."""
    if dtype == tl.bfloat16:
        return interpreter.TensorHandle(rounded(values.astype(np.float32)), tl.bfloat16)
    codes = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(FLOAT8[dtype])
    return interpreter.TensorHandle(codes.view(torch.uint8).numpy(), dtype)


def replacements(
    count_flops: Callable[[int], None], error: type[Exception]
) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """Yield (owner, name, replacement) for every method; dots are counted, and refused arithmetic raises ``error``."""
    builder = interpreter.InterpreterBuilder
    yield builder, "create_dot", _dot(builder.create_dot, count_flops)
    yield builder, "binary_op", _binary(builder.binary_op)
    for name in ("cast_impl", "create_fp_to_fp"):
        yield builder, name, _cast(getattr(builder, name))
    yield builder, "create_fma", _refusing(builder.create_fma, error)
    yield builder, "ternary_op", _ternary(builder.ternary_op, error)
    interface = interpreter.ReduceScanOpInterface
    yield interface, "check_tensor", _reduction(interface.check_tensor, error)


def _dot(original: Callable[..., Any], count_flops: Callable[[int], None]) -> Callable[..., Any]:
    def dot(builder: Any, a: Any, b: Any, total: Any, *rest: Any) -> Any:
        (rows, inner), columns = a.data.shape[-2:], b.data.shape[-1]
        count_flops(2 * rows * inner * columns)
        if a.dtype.scalar.is_floating() and total.dtype.scalar == tl.float32:
            made = np.matmul(values_of(a).astype(np.float32), values_of(b).astype(np.float32)) + total.data
            return interpreter.TensorHandle(made, tl.float32)
        return original(builder, a, b, total, *rest)

    return dot


def _binary(original: Callable[..., Any]) -> Callable[..., Any]:
    def binary(builder: Any, left: Any, right: Any, operation: Any) -> Any:
        if not _is_bfloat16(left):
            return original(builder, left, right, operation)
        made = operation(widened(left.data), values_of(right))
        if made.dtype == np.bool_:
            return interpreter.TensorHandle(made, tl.bfloat16)
        return _stored(made, tl.bfloat16)

    return binary


def _cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def cast(builder: Any, source: Any, target: Any, *rest: Any) -> Any:
        special = (tl.bfloat16, *FLOAT8)
        if source.dtype.scalar not in special and target.scalar not in special:
            return original(builder, source, target, *rest)
        values = values_of(source)
        if target.scalar in special:
            return _stored(values, target.scalar)
        return interpreter.TensorHandle(values.astype(interpreter._get_np_dtype(target)), target.scalar)

    return cast


def _ternary(original: Callable[..., Any], error: type[Exception]) -> Callable[..., Any]:
    def ternary(builder: Any, first: Any, second: Any, third: Any, operation: Any) -> Any:
        if operation is not np.where and any(_is_bfloat16(one) for one in (first, second, third)):
            raise error(_sentence(operation.__name__))
        return original(builder, first, second, third, operation)

    return ternary


def _refusing(original: Callable[..., Any], error: type[Exception]) -> Callable[..., Any]:
    def refuse(builder: Any, *args: Any) -> Any:
        if any(_is_bfloat16(one) for one in args):
            raise error(_sentence(original.__name__))
        return original(builder, *args)

    return refuse


def _reduction(original: Callable[..., Any], error: type[Exception]) -> Callable[..., Any]:
    def check(interface: Any, tensors: Any) -> None:
        if any(one.dtype.scalar == tl.bfloat16 for one in tensors):
            raise error(_sentence("a reduction"))
        original(interface, tensors)

    return check


def _sentence(what: str) -> str:
    return f"the interpreter computes {what} of bfloat16 wrongly; convert to float32 right after loading."
