"""The CUDA sources of this folder on the CPU: built with ``shim/`` by the system's C++ compiler, called by ctypes.

What runs is the source that a GPU runs, thread by thread; see ``shim/hostsim.h``. One launch at a time in a process.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_char, c_char_p, c_int, c_longlong, c_ulonglong, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import ClassVar

from ...contracts import MoebenchError
from ..cpu import build
from . import layer, symmetric
from .driver import marshal
from .layer import Launch, Tiles

FLAGS = ("-std=c++20", "-O2", "-DMOE_HOSTSIM", "-Wno-unknown-pragmas", "-fPIC")

SOURCES = Path(__file__).parent

SIGNATURES = {**layer.SIGNATURES, **symmetric.SIGNATURES}

ORDERS = ("forward", "reverse", "random")

_LOCK = Lock()
"""The shim has one scheduler."""


@dataclass(frozen=True)
class Schedule:
    """How threads take turns: ``order`` of ORDERS, asynchronous copies ``late`` or at once, resident blocks, and seed.

    ``mutant`` is read by sources that tests have edited.
    """

    order: str = "forward"
    late: bool = True
    multiprocessors: int = 4
    seed: int = 0
    mutant: int = 0

    @property
    def numbers(self) -> Config:
        """As the shim reads it."""
        return Config(self.multiprocessors, ORDERS.index(self.order), int(self.late), self.mutant, self.seed)


class Config(Structure):
    """``sim::Config``."""

    _fields_: ClassVar = [
        *((name, c_int) for name in ("multiprocessors", "order", "late", "mutant")),
        ("seed", c_ulonglong),
    ]


COUNTED = ("launches", "blocks", "barriers", "mma", "shuffles", "ballots", "async_bytes", "atomics", "switches")


class Report(Structure):
    """``sim::Report``: what was counted; ``barriers`` are those of blocks, ``mma`` those of warps."""

    _fields_: ClassVar = [*((name, c_longlong) for name in COUNTED), ("failed", c_int), ("message", c_char * 500)]


class NamedGrid(Structure):
    """``NamedGrid`` of ``shim/entry.cpp``."""

    _fields_: ClassVar = [
        ("kernel", c_char_p),
        *((name, c_int) for name in ("blocks", "threads", "shared_bytes")),
        ("arguments", POINTER(c_void_p)),
    ]


def missing() -> str:
    """Return why kernels cannot be run on the CPU here, or an empty string; nothing is built to find out."""
    return build.missing("the host shim of the CUDA kernels", "CXX")


def built(tiles: Tiles, name: str, sources: Path, flags: Sequence[str]) -> Path:
    """Return what the shim and the kernels in folder ``sources`` are compiled to, from the cache where it is there.

    The scheduler is compiled without ``flags`` that begin with -fsanitize; the kernels with them.
    """
    program = build.compiler("CXX")
    if program is None:
        raise MoebenchError(f"{missing()}.")
    read = sorted(path for path in sources.rglob("*") if path.suffix in (".cuh", ".h", ".cpp"))
    version = build.version(program)
    plain = [flag for flag in flags if not flag.startswith(("-fsanitize", "-fno-sanitize", "-shared"))]
    shim = sources / "shim"
    scheduler = build.cached("hostsim.o", [program, *FLAGS, *plain, "-c", str(shim / "hostsim.cpp")], read, version)
    entry = [str(shim / ("entry.cpp" if "-shared" in flags else "replay.cpp"))]
    command = [program, *FLAGS, *tiles.options, *flags, *entry, str(scheduler)]
    return build.cached(name, command, read, version)


@cache
def shim(tiles: Tiles) -> Shim:
    """Return the kernels with these tiles, built where the cache does not have them."""
    return Shim(tiles)


class Shim:
    """The kernels of this folder as a library of the host."""

    def __init__(self, tiles: Tiles) -> None:
        self.told = f"{Path(build.compiler('CXX') or '').name} {' '.join((*FLAGS, *tiles.options))}"
        self.library = build.load(built(tiles, f"hostsim{build.SUFFIX}", SOURCES, ("-shared",)))
        self.library.sim_launch.argtypes = [POINTER(NamedGrid), c_int, POINTER(Config), POINTER(Report)]

    def launch(self, together: Sequence[Launch], schedule: Schedule, report: Report) -> None:
        """Run kernels at the same time, each on a device of its own; ``report`` goes on counting.

        MoebenchError where they do not end as kernels must: a deadlock, or a barrier that not all threads reach.
        """
        held = [marshalled(one) for one in together]
        grids = (NamedGrid * len(together))(
            *(
                NamedGrid(one.kernel.encode(), one.blocks, one.threads, one.shared_bytes, pointers)
                for one, (_, pointers) in zip(together, held, strict=True)
            )
        )
        with _LOCK:
            failed = self.library.sim_launch(grids, len(together), schedule.numbers, ctypes.byref(report))
        if failed:
            raise MoebenchError(f"{together[0].kernel} on the host shim: {report.message.decode()}.")


def marshalled(launch: Launch) -> tuple[list[object], ctypes.Array[c_void_p]]:
    """Return the arguments of a launch as objects of their types, and the array of their addresses.

    A tuple of tensors is passed as a table of their addresses.
    """
    tables = [
        (c_void_p * len(one))(*(tensor.data_ptr() for tensor in one)) if isinstance(one, tuple) else one
        for one in launch.arguments
    ]
    plain = [ctypes.addressof(one) if isinstance(one, ctypes.Array) else one for one in tables]
    values = marshal(launch.kernel, SIGNATURES[launch.kernel], plain)
    return [*values, tables], (c_void_p * len(values))(*map(ctypes.addressof, values))
