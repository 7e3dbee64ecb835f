"""Loading cubins and launching their kernels, through CUDA's driver in torch's own context and stream.

``Module`` does all but the driver's calls; those are the few methods of ``Driver``, of which ``CudaDriver`` is the real
one. Nothing is loaded when this module is imported.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ...contracts import MoebenchError, unknown
from ..devices import missing
from .nvrtc import INSTALL

Signature = tuple[type, ...]
"""The ctypes types of a kernel's arguments: their widths must be those of its C++ parameters."""

Dim = tuple[int, int, int]

PLAIN_SHARED = 48 * 1024
"""A kernel that wants more dynamic shared memory than this has to say so before it is launched."""


class Driver(Protocol):
    """What ``Module`` needs of a driver. ``arguments`` is the address of an array of addresses of arguments."""

    def load(self, code: bytes) -> Any:
        """Load a cubin."""

    def function(self, module: Any, name: str) -> Any:
        """Return a kernel of a loaded module."""

    def allow_shared(self, function: Any, size: int) -> None:
        """Let a kernel have ``size`` bytes of dynamic shared memory."""

    def launch(self, function: Any, grid: Dim, block: Dim, shared: int, arguments: int) -> None:
        """Launch a kernel on the current stream."""

    def unload(self, module: Any) -> None:
        """Unload a module."""


class Module:
    """The kernels of a cubin on a device; ``signatures`` has one entry per kernel that may be launched."""

    def __init__(self, driver: Driver, code: bytes, signatures: Mapping[str, Signature]) -> None:
        self._driver, self._signatures = driver, signatures
        self._module = driver.load(code)
        self._functions = {name: driver.function(self._module, name) for name in signatures}
        self._allowed = dict.fromkeys(signatures, PLAIN_SHARED)

    def launch(self, name: str, grid: Dim, block: Dim, shared: int, arguments: Sequence[Any]) -> None:
        """Launch kernel ``name`` on the current stream with ``shared`` bytes of dynamic shared memory.

        An argument is a number, a structure of its declared type, or a tensor, whose address is passed; the caller
        keeps tensors alive and on the stream. MoebenchError where arguments are not those of the signature.
        """
        if name not in self._signatures:
            raise MoebenchError(unknown("kernel", name, self._signatures))
        held = marshal(name, self._signatures[name], arguments)
        if shared > self._allowed[name]:
            self._driver.allow_shared(self._functions[name], shared)
            self._allowed[name] = shared
        addresses = (ctypes.c_void_p * max(1, len(held)))(*map(ctypes.addressof, held))
        self._driver.launch(self._functions[name], grid, block, shared, ctypes.addressof(addresses))

    def close(self) -> None:
        """Unload the code."""
        self._driver.unload(self._module)
        self._functions = {}


def marshal(name: str, signature: Signature, arguments: Sequence[Any]) -> list[Any]:
    """Return ``arguments`` as objects of the types that ``signature`` declares, whose memory is what is passed."""
    if len(arguments) != len(signature):
        raise MoebenchError(f"kernel '{name}' takes {len(signature)} arguments, not {len(arguments)}; give those.")
    return [
        _one(f"argument {i} of kernel '{name}'", *pair) for i, pair in enumerate(zip(signature, arguments, strict=True))
    ]


def _one(where: str, kind: type, value: Any) -> Any:
    if isinstance(value, kind):
        return value
    if kind is ctypes.c_void_p and hasattr(value, "data_ptr"):
        return ctypes.c_void_p(value.data_ptr())
    try:
        made = kind(value)
    except TypeError as error:
        raise MoebenchError(f"{where} is no {kind.__name__} but {value!r}; give one.") from error
    if isinstance(value, int) and (made.value or 0) != value:  # ctypes cuts integers to their width without a word
        raise MoebenchError(f"{where} does not hold {value}; give what fits {kind.__name__}.")
    return made


class CudaDriver:
    """CUDA's driver by ``cuda.bindings``; the context is the device's primary one, which is torch's."""

    def __init__(self) -> None:
        why = missing("CUDA")
        if why:
            raise MoebenchError(f"{why}; kernels are launched on a machine with a CUDA device alone.")
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise MoebenchError(f"cuda-bindings is not installed; {INSTALL}.") from error
        import torch

        self._cuda, self._torch = driver, torch
        torch.empty(1, device="cuda")  # torch makes the primary context current when it first needs it

    def arch(self) -> str:
        """Return what the current device runs, such as ``sm_90``."""
        major, minor = self._torch.cuda.get_device_capability()
        return f"sm_{major}{minor}"

    def load(self, code: bytes) -> Any:
        """Load a cubin into the current context."""
        return self._call(self._cuda.cuModuleLoadData, code)

    def function(self, module: Any, name: str) -> Any:
        """Return a kernel of a loaded module."""
        return self._call(self._cuda.cuModuleGetFunction, module, name.encode())

    def allow_shared(self, function: Any, size: int) -> None:
        """Let a kernel have ``size`` bytes of dynamic shared memory."""
        attribute = self._cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._call(self._cuda.cuFuncSetAttribute, function, attribute, size)

    def launch(self, function: Any, grid: Dim, block: Dim, shared: int, arguments: int) -> None:
        """Launch a kernel on torch's current stream; the driver has copied the arguments when this returns."""
        stream = self._torch.cuda.current_stream().cuda_stream
        self._call(self._cuda.cuLaunchKernel, function, *grid, *block, shared, stream, arguments, 0)

    def unload(self, module: Any) -> None:
        """Unload a module."""
        self._call(self._cuda.cuModuleUnload, module)

    def _call(self, function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
        code, *values = function(*arguments)
        if code != self._cuda.CUresult.CUDA_SUCCESS:
            raise MoebenchError(
                f"the CUDA driver answered {function.__name__} with {code.name}; run moebench doctor for what is here."
            )
        return values[0] if values else None
