"""Descriptor and parameters of suite ``static``. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..contracts import Descriptor, unknown
from ..kernels.targets import DEVICES, TARGETS
from .plugins import LayerSuite
from .static_kernels import KERNELS, parse_tile


@dataclass(frozen=True)
class Static:
    """What compilers make of our GPU kernels, without any GPU: a case per kernel, target and tile; and roofline bounds.

    ``kernel`` names kernels (nothing: all), compiled for ``target`` as they are launched for ``tokens`` tokens of a
    layer of the model; ``tile`` such as `64x128x64-w8-s3` (assignments x outputs x inputs, warps, stages) replaces the
    tiles that a backend may take. A case is `wrong` where code spills, cannot be launched, or lacks tensor-core or
    asynchronous-copy instructions. Rows of ``device`` have evidence `model`: the least time that its vendor's peak
    figures leave for the layer, with the weights of as many experts read as tokens can reach.
    """

    kernel: tuple[str, ...] = ()
    target: tuple[str, ...] = tuple(TARGETS)
    tile: tuple[str, ...] = ()
    device: tuple[str, ...] = tuple(DEVICES)

    AXES: ClassVar[Mapping[str, Any]] = {
        **LayerSuite.AXES,
        "model": ["olmoe-1b-7b"],
        "backend": ["eager"],
        "tokens": [4, 256, 4096],
        "dtype": ["bfloat16"],
    }

    def __post_init__(self) -> None:
        known = {"kernel": [kernel.name for kernel in KERNELS], "target": TARGETS, "device": DEVICES}
        for field, names in known.items():
            for name in getattr(self, field):
                if name not in names:
                    raise ValueError(unknown(field, name, names))
        for text in self.tile:
            parse_tile(text)


DESCRIPTORS = [
    Descriptor(
        "suite",
        "static",
        "registers, spills, shared memory and instructions of GPU kernels, compiled without a GPU",
        "moebench.suites.static:create",
        Static,
    ),
]
