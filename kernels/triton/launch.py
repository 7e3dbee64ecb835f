"""The one way in which kernels are launched: on a device, by the interpreter under its guard, or into a compiler.

``@triton.jit`` decides when it runs, by TRITON_INTERPRET, whether a kernel is compiled or interpreted; a process has
kernels of one kind. Within ``compiling(target)`` nothing is launched: each launch is compiled for a device that need
not exist, with the same arguments, constants and specialisation, so that what is inspected is what would run. Arguments
may be tensors of torch's device ``meta`` there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.runtime.interpreter import InterpretedFunction

from ...contracts import MoebenchError
from . import guard
from .tiles import Tiles


@dataclass(frozen=True)
class Compiled:
    """A launch that was compiled: ``binary`` is triton's CompiledKernel (``asm``, ``metadata``) for ``target``."""

    name: str
    target: Any
    grid: tuple[int, ...]
    tiles: Tiles
    constants: Mapping[str, Any]
    binary: Any = field(repr=False)


_collecting: list[tuple[Any, list[Compiled]]] = []


def launch(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], tiles: Tiles, **constants: Any) -> None:
    """Run ``kernel`` on ``grid`` programs.

    ``args`` are its run-time arguments in order; ``constants`` its compile-time ones by name, to which those of
    BLOCK_M, BLOCK_N and BLOCK_K that the kernel has are added from ``tiles``. A grid without programs is not launched.
    """
    blocks = {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k}
    constants = {**{name: size for name, size in blocks.items() if name in kernel.arg_names}, **constants}
    if 0 in grid:
        return
    if is_interpreted(kernel):
        _interpret(kernel, grid, args, constants)
        return
    options = {**constants, "num_warps": tiles.warps, "num_stages": tiles.stages}
    if not _collecting:
        kernel[grid](*args, **options)
        return
    target, compiled = _collecting[-1]
    binary = kernel.warmup(*args, grid=grid, **options)
    compiled.append(Compiled(kernel.__name__, target, grid, tiles, constants, binary))


def is_interpreted(kernel: Any) -> bool:
    """Whether a kernel was decorated while TRITON_INTERPRET was set."""
    return isinstance(kernel, InterpretedFunction)


def _interpret(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: Mapping[str, Any]) -> None:
    if _collecting:
        raise MoebenchError("interpreted kernels cannot be compiled; start a process without TRITON_INTERPRET.")
    if constants.get("FORM") == "mxfp4_scaled":
        raise MoebenchError("triton's interpreter has no tl.dot_scaled; compile this kernel, or use the form mxfp4.")
    with guard.watching(kernel.__name__):
        kernel[grid](*args, **constants)


@contextmanager
def compiling(target: Any) -> Iterator[list[Compiled]]:
    """Compile what is launched within, for ``target`` (``triton.backends.compiler.GPUTarget``), and launch nothing.

    Yields the list to which every launch is added; equal launches share a binary. What a compiler says is raised
    as it is. Needs no device, and a process whose kernels are not interpreted.
    """
    compiled: list[Compiled] = []
    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(_Absent(target))
    _collecting.append((target, compiled))
    try:
        yield compiled
    finally:
        _collecting.pop()
        driver._active = before


class _Absent:
    """A driver of a device that is not there: it tells compilers its target, and each target is a device of its own."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend} {self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0
