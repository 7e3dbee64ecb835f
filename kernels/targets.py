"""What kernels are compiled for (``TARGETS``), and devices that have been sold with it (``DEVICES``). Imports no torch.

Of the CUDA targets, blocks of a multiprocessor and units agree with NVIDIA's occupancy header, which the tests compile
where it is installed. All other figures are the vendors' data sheets from memory (``SOURCE``): they bound a model's
times, and stand beside no measured one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..contracts import MoebenchError, unknown

SOURCE = "the vendors' data sheets, from memory"
"""Where the figures of ``DEVICES``, the threads of a multiprocessor and the limits of gfx942 come from."""

KIB = 1024


@dataclass(frozen=True)
class Target:
    """An instruction set and what one multiprocessor of it holds.

    Shared memory in bytes: ``shared_per_block`` is the most that a kernel may ask for, ``shared_per_processor`` what
    the blocks of a multiprocessor share, ``shared_reserved`` what the driver adds to each block, ``shared_unit`` the
    granularity. Registers are 32 bits wide: a warp gets ``register_unit`` of them at a time, from one of ``partitions``
    equal parts. ``async_copy`` tells whether Triton copies to shared memory without passing registers there.
    """

    name: str
    platform: Literal["CUDA", "ROCm"]
    warp: int
    threads_per_block: int
    threads_per_processor: int
    blocks_per_processor: int
    registers_per_thread: int
    registers_per_processor: int
    register_unit: int
    shared_per_block: int
    shared_per_processor: int
    shared_reserved: int
    shared_unit: int
    partitions: int = 4
    async_copy: bool = True

    @property
    def arch(self) -> int | str:
        """What Triton calls it: the compute capability times ten, or the name."""
        return int(self.name.removeprefix("sm_")) if self.platform == "CUDA" else self.name


def _cuda(name: str, threads: int, blocks: int, shared: int) -> Target:
    return Target(
        name=name,
        platform="CUDA",
        warp=32,
        threads_per_block=1024,
        threads_per_processor=threads,
        blocks_per_processor=blocks,
        registers_per_thread=255,
        registers_per_processor=64 * KIB,
        register_unit=256,
        shared_per_block=shared - KIB,
        shared_per_processor=shared,
        shared_reserved=KIB,
        shared_unit=128,
    )


_GFX942 = Target(
    name="gfx942",
    platform="ROCm",
    warp=64,
    threads_per_block=1024,
    threads_per_processor=2048,
    blocks_per_processor=32,
    registers_per_thread=512,
    registers_per_processor=128 * KIB,
    register_unit=512,
    shared_per_block=64 * KIB,
    shared_per_processor=64 * KIB,
    shared_reserved=0,
    shared_unit=512,
    async_copy=False,
)

TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        _cuda("sm_80", 2048, 32, 164 * KIB),
        _cuda("sm_90", 2048, 32, 228 * KIB),
        _cuda("sm_100", 2048, 32, 228 * KIB),
        _cuda("sm_120", 1536, 24, 100 * KIB),
        _GFX942,
    )
}
"""Every target, by its name."""


@dataclass(frozen=True)
class Device:
    """A device as sold: dense ``flops`` a second by dtype (sums in float32), ``bytes_per_s`` of its memory."""

    name: str
    target: str
    processors: int
    flops: Mapping[str, float]
    bytes_per_s: float


def _device(name: str, target: str, processors: int, tflops: Mapping[str, float], terabytes: float) -> Device:
    flops = {dtype: value * 1e12 for dtype, value in tflops.items()}
    return Device(name, target, processors, {**flops, "float16": flops["bfloat16"]}, terabytes * 1e12)


DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        _device("a100-sxm", "sm_80", 108, {"bfloat16": 312, "float32": 19.5}, 2.039),
        _device("h100-sxm", "sm_90", 132, {"bfloat16": 989, "float32": 67}, 3.35),
        _device("b200", "sm_100", 148, {"bfloat16": 2250, "float32": 75}, 8.0),
        _device("rtx-5090", "sm_120", 170, {"bfloat16": 209.5, "float32": 104.8}, 1.792),
        _device("mi300x", "gfx942", 304, {"bfloat16": 1307, "float32": 163.4}, 5.3),
    )
}
"""Every named device, by its name; figures are ``SOURCE``."""


def target(name: str) -> Target:
    """Return the target of this name, or raise MoebenchError with a sentence."""
    if name not in TARGETS:
        raise MoebenchError(unknown("target", name, TARGETS))
    return TARGETS[name]


def device(name: str) -> Device:
    """Return the device of this name, or raise MoebenchError with a sentence."""
    if name not in DEVICES:
        raise MoebenchError(unknown("device", name, DEVICES))
    return DEVICES[name]
