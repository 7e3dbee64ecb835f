"""What watches interpreted kernels: bounds, races between programs, bfloat16 as devices have it, counted traffic.

Triton's interpreter runs one program after another and reads and writes wherever a pointer says. Here every pointer
knows the tensor that it was made of, and a load, store or atomic beyond that tensor is an error, as is a store to what
another program of the launch has stored, or a load of it: on a device their order is not known. The interpreter's
bfloat16 arithmetic is wrong (guard_floats.py mends it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import triton
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from ...contracts import MoebenchError
from . import guard_floats

RELEASE = "3.7."
METHODS = (
    "create_addptr",
    "create_splat",
    "create_broadcast",
    "create_expand_dims",
    "create_reshape",
    "create_trans",
    "create_masked_load",
    "create_masked_store",
    "create_atomic_rmw",
    *guard_floats.METHODS,
)
"""What is replaced in triton's InterpreterBuilder, and must be there."""

FUNCTIONS = ("_implicit_cvt", "_patch_lang", "interpreter_builder", "InterpreterOptions", "ReduceScanOpInterface")
"""What is replaced, or used, of the interpreter besides."""

FREE, ATOMIC = -1, -2


class GuardError(MoebenchError):
    """A kernel did what a device would not forgive."""


@dataclass
class Traffic:
    """What the programs of a kernel did: bytes of single numbers loaded, stored and added to, and FLOPs of dots."""

    programs: int = 0
    loaded: int = 0
    stored: int = 0
    added: int = 0
    flops: int = 0


@dataclass(eq=False)
class Span:
    """The bytes of a tensor, and which program stored each of its numbers last."""

    start: int
    stop: int
    name: str
    owner: npt.NDArray[np.int64] | None = field(default=None, repr=False)

    def owners(self, size: int) -> npt.NDArray[np.int64]:
        """Return the table of owners, made at the first store."""
        if self.owner is None:
            self.owner = np.full((self.stop - self.start) // size, FREE, dtype=np.int64)
        return self.owner


_counting: list[dict[str, Traffic]] = []


@contextmanager
def counting() -> Iterator[dict[str, Traffic]]:
    """Count what interpreted kernels do within; yields their traffic by the kernel's name."""
    counted: dict[str, Traffic] = {}
    _counting.append(counted)
    try:
        yield counted
    finally:
        _counting.remove(counted)


@contextmanager
def watching(kernel: str) -> Iterator[None]:
    """Watch one launch.

    Raises:
        MoebenchError: triton is another release than 3.7, or lacks a method that is watched.
        GuardError: the kernel reads or writes out of bounds, two of its programs race, or it does arithmetic in
            bfloat16 that the interpreter gets wrong.
    """
    check_release()
    launch = _Launch(kernel)
    with ExitStack() as stack:
        for owner, name, replacement in launch.replacements():
            stack.enter_context(patch.object(owner, name, replacement))
        try:
            yield
        except InterpreterError as error:
            raise _cause(error) from None


@cache
def check_release() -> None:
    """Refuse a triton whose interpreter is not the one that the guard knows."""
    if not triton.__version__.startswith(RELEASE):
        raise MoebenchError(f"the guard knows triton {RELEASE}x, not {triton.__version__}; install triton==3.7.1.")
    missing = [name for name in METHODS if not hasattr(interpreter.InterpreterBuilder, name)]
    missing += [name for name in FUNCTIONS if not hasattr(interpreter, name)]
    if missing:
        raise MoebenchError(f"triton's interpreter has no {', '.join(missing)}; install triton==3.7.1.")


def _cause(error: BaseException) -> BaseException:
    """Return what the guard said where it is behind an error of the interpreter, else that error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, GuardError):
            return cause
        cause = cause.__cause__
    return error


class _Launch:
    """The state of one launch, and the methods that stand in for the interpreter's."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.spans: dict[tuple[int, int], Span] = {}
        self.counted = [counts.setdefault(kernel, Traffic()) for counts in _counting]

    def replacements(self) -> Iterator[tuple[Any, str, Any]]:
        """Yield (owner, name, replacement)."""
        builder = interpreter.InterpreterBuilder
        yield interpreter, "_implicit_cvt", self._argument(interpreter._implicit_cvt)
        yield interpreter, "_patch_lang", _once_a_module(interpreter._patch_lang)
        # Sums of integers are checked for overflow, and what is found is dropped: a fifth of the time for nothing.
        yield interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(sanitize_overflow=False)
        for name in METHODS[:6]:
            yield builder, name, _carrying(getattr(builder, name))
        yield builder, "create_masked_load", self._load(builder.create_masked_load)
        yield builder, "create_masked_store", self._store(builder.create_masked_store)
        yield builder, "create_atomic_rmw", self._atomic(builder.create_atomic_rmw)
        yield builder, "set_grid_idx", self._program(builder.set_grid_idx)
        yield from guard_floats.replacements(self._count_flops, GuardError)

    def _argument(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def convert(arg: Any) -> Any:
            made = original(arg)
            if hasattr(arg, "data_ptr"):
                last = sum((size - 1) * stride for size, stride in zip(arg.shape, arg.stride(), strict=True))
                size = (last + 1) * arg.element_size() if arg.numel() else 0
                key = (arg.data_ptr(), arg.data_ptr() + size)
                name = f"a tensor of {list(arg.shape)} {str(arg.dtype).removeprefix('torch.')}"
                made.handle.attr["span"] = self.spans.setdefault(key, Span(*key, name))
            return made

        return convert

    def _program(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def begin(builder: Any, *index: int) -> None:
            for traffic in self.counted:
                traffic.programs += 1
            original(builder, *index)

        return begin

    def _load(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def load(builder: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
            span, number, size = self._touched(builder, pointers, mask, "load")
            if span.owner is not None:
                self._race(builder, span, span.owner[number], "loads what another program stores")
            for traffic in self.counted:
                traffic.loaded += number.size * size
            return original(builder, pointers, mask, other, *rest)

        return load

    def _store(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            span, number, size = self._touched(builder, pointers, mask, "store")
            if np.unique(number).size < number.size:
                raise GuardError(f"{self._where(builder)} stores twice to one number of {span.name}.")
            owners = span.owners(size)
            self._race(builder, span, owners[number], "stores to what another program stores")
            owners[number] = _index(builder)
            for traffic in self.counted:
                traffic.stored += number.size * size
            return original(builder, pointers, value, mask, *rest)

        return store

    def _atomic(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def add(builder: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            span, number, size = self._touched(builder, pointers, mask, "atomic")
            owners = span.owners(size)
            stored = owners[number]
            self._race(builder, span, stored[stored != ATOMIC], "adds to what another program stores")
            owners[number] = ATOMIC
            for traffic in self.counted:
                traffic.added += number.size * size
            return original(builder, operation, pointers, value, mask, *rest)

        return add

    def _touched(self, builder: Any, pointers: Any, mask: Any, what: str) -> tuple[Span, npt.NDArray[np.int64], int]:
        """Return (span, the numbers of it that are touched, their size), or raise where one is not of it."""
        span: Span | None = pointers.attr.get("span")
        if span is None:
            raise GuardError(f"{self._where(builder)} has a {what} whose tensor is not known; mend the guard.")
        addresses, inside = np.broadcast_arrays(pointers.data, mask.data.astype(bool))
        touched = addresses[inside].astype(np.int64)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        wrong = (touched < span.start) | (touched + size > span.stop)
        if wrong.any():
            count = f"{int(wrong.sum())} of {touched.size} addresses"
            raise GuardError(f"{self._where(builder)} has a {what} out of bounds: {count} lie beyond {span.name}.")
        return span, (touched - span.start) // size, size

    def _race(self, builder: Any, span: Span, owners: npt.NDArray[np.int64], what: str) -> None:
        other = owners[(owners != FREE) & (owners != _index(builder))]
        if other.size:
            raise GuardError(f"{self._where(builder)} {what}: {other.size} numbers of {span.name}.")

    def _where(self, builder: Any) -> str:
        return f"program {tuple(builder.grid_idx)} of {self.kernel}"

    def _count_flops(self, flops: int) -> None:
        for traffic in self.counted:
            traffic.flops += flops


def _index(builder: Any) -> int:
    """Return the number of the program that runs."""
    (x, y, z), (_, ny, nz) = builder.grid_idx, builder.grid_dim
    return int((x * ny + y) * nz + z)


def _carrying(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that hands the tensor of a pointer among its arguments on to the pointers that it makes."""

    def carry(builder: Any, *args: Any) -> Any:
        made = original(builder, *args)
        for arg in args:
            if isinstance(arg, interpreter.TensorHandle) and "span" in arg.attr:
                made.attr["span"] = arg.attr["span"]
        return made

    return carry


def _once_a_module(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return what makes a module's language the interpreter's, as every call of a helper asks again; once is enough."""
    done: set[str] = set()

    def change(fn: Any) -> Any:
        if fn.__module__ in done:
            return interpreter._LangPatchScope()
        done.add(fn.__module__)
        return original(fn)

    return change
