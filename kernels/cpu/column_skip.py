"""``column_skip.c`` as Python calls it: its structures by ctypes, tensors by their addresses. Imports no torch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from typing import ClassVar

from . import build

SITES = ("input", "gate", "hidden")
"""The sites in the order of the kernel's enum."""

ACTIVATIONS = ("silu", "gelu", "relu")
"""The activations in the order of the kernel's enum."""

Pointers = POINTER(c_void_p)


class Site(Structure):
    """Which channels of a site are kept, and the low-rank part for the others; all zeros keeps every channel."""

    _fields_: ClassVar = [
        ("active", c_int32),
        ("by_expert", c_int32),
        ("top", c_int64),
        ("rank", c_int64),
        ("weight", c_void_p),
        ("right", Pointers),
        ("left", Pointers),
        ("threshold", c_float),
    ]


class Layer(Structure):
    """One layer: sizes, how its weights are stored, where those of each expert are, and its sites."""

    _fields_: ClassVar = [
        ("hidden", c_int64),
        ("width", c_int64),
        ("chunk", c_int64),
        ("bfloat16", c_int32),
        ("activation", c_int32),
        ("gated", c_int32),
        ("first", Pointers),
        ("up", Pointers),
        ("down", Pointers),
        ("sites", Site * len(SITES)),
    ]


class Count(Structure):
    """Channels of tokens: how many were kept, of how many; columns of chunks: how many were read, of how many."""

    _fields_: ClassVar = [(name, c_int64) for name in ("kept", "channels", "columns_read", "columns")]


Counts = Count * len(SITES)


def pointers(addresses: Sequence[int]) -> ctypes.Array[c_void_p]:
    """Return addresses as C reads them."""
    return (c_void_p * len(addresses))(*addresses)


class Kernel:
    """The built library. The caller keeps alive whatever its addresses point at."""

    def __init__(self) -> None:
        library = build.library("column_skip")
        self.told = library.told
        self.layer = library.handle.column_skip_layer
        self.layer.argtypes = [POINTER(Layer), c_int64, *[c_void_p] * 6, Counts]
        self.layer.restype = None
        self.sort = library.handle.column_skip_sort
        self.sort.argtypes = [c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_void_p]
        self.sort.restype = None
