"""``moe.cuh`` as Python calls it: its tiles, the arguments of its kernels, and the launches of one layer.

Imports no torch. Letters: T tokens, H hidden, F expert width, E experts, N assignments.
"""

from __future__ import annotations

from ctypes import c_int32, c_void_p
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from ...contracts import MoebenchError

SOURCE = Path(__file__).with_name("moe.cuh")

DTYPES = ("bfloat16", "float16")

ACTIVATIONS = ("silu", "gelu", "relu")
"""The activations in the order of the kernels' enum."""

POINTERS = (
    "x_TH",
    "gate_up",
    "down_EHF",
    "token_N",
    "offsets_E1",
    "weight_N",
    "hidden_NF",
    "partial",
    "order_N",
    "spans_T2",
    "state",
    "slots",
    "out_TH",
)
SIZES = ("tokens", "experts", "hidden", "width", "activation", "gated", "atomic")

ARGUMENTS: dict[str, type] = {**dict.fromkeys(POINTERS, c_void_p), **dict.fromkeys(SIZES, c_int32)}
"""Names and widths of the arguments of every kernel of a layer, in their order."""

KERNELS = ("moe_fused", "moe_gate_up", "moe_down_combine")

SIGNATURES = {f"{name}_{dtype}": tuple(ARGUMENTS.values()) for name in KERNELS for dtype in DTYPES}
"""The types of the arguments of each kernel, as ``driver.Module`` takes them."""

ONLY = {dtype: f"-DMOE_ONLY_{dtype.upper()}" for dtype in DTYPES}
"""The option of a compiler to leave out the kernels of the other dtype."""

STATE_FIELDS = 4
"""Counters of a whole launch, ahead of those of token tiles and row blocks."""


@dataclass(frozen=True)
class Tiles:
    """What a block works on at once: ``bm`` assignments by ``bn`` columns, in steps of ``bk``; by how many warps."""

    bm: int = 64
    bn: int = 64
    bk: int = 32
    stages: int = 3
    warps_m: int = 2
    warps_n: int = 2

    def __post_init__(self) -> None:
        if self.bm % (16 * self.warps_m) or self.bn % (8 * self.warps_n) or self.bk % 16 or self.stages < 2:
            raise MoebenchError(
                f"{self} is not made of whole products: bm must be a multiple of 16 warps_m, bn of 8 warps_n, bk of "
                "16, and stages at least 2."
            )

    @property
    def options(self) -> tuple[str, ...]:
        """How a compiler is told."""
        return tuple(f"-DMOE_{field.name.upper()}={getattr(self, field.name)}" for field in fields(self))

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps_m * self.warps_n

    @property
    def token_tile(self) -> int:
        """Tokens of one dispatch or combine task."""
        return 4 * self.warps_m * self.warps_n

    def shared_bytes(self, experts: int) -> int:
        """Return the bytes of dynamic shared memory of a block: ``struct Shared``, which ends with E + 1 numbers."""
        stages = 2 * self.stages * (self.bm + 2 * self.bn) * (self.bk + 8)
        whole = stages + 8 * self.bm + 4 * self.bm + 4 + 4 + 4 + 4 * (experts + 1)
        return -(-whole // 16) * 16


class Launch(NamedTuple):
    """One kernel: name, blocks, threads and bytes of shared memory of each block, arguments (tensors and numbers)."""

    kernel: str
    blocks: int
    threads: int
    shared_bytes: int
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a call: T, E, H, F and the most assignments that it may have."""

    tokens: int
    experts: int
    hidden: int
    width: int
    assignments: int

    def row_blocks(self, tiles: Tiles) -> int:
        """Return the most row blocks that any routing of these sizes has: each expert may leave one unfilled."""
        return self.assignments // tiles.bm + min(self.experts, self.assignments)

    def token_tiles(self, tiles: Tiles) -> int:
        """Return the number of dispatch (and of combine) tasks."""
        return ceil_div(self.tokens, tiles.token_tile)

    def state_numbers(self, tiles: Tiles) -> int:
        """Return the length of ``state`` (int32)."""
        return STATE_FIELDS + self.token_tiles(tiles) + self.row_blocks(tiles)

    def slots(self, tiles: Tiles) -> int:
        """Return the length of ``slots`` (uint64): the tasks that wait for others."""
        return self.row_blocks(tiles) * ceil_div(self.hidden, tiles.bn) + self.token_tiles(tiles)


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def launches(
    variant: str, dtype: str, tiles: Tiles, sizes: Sizes, arguments: tuple[Any, ...], blocks: int
) -> list[Launch]:
    """Return the launches of one layer: one of ``blocks`` blocks (variant ``fused``), or two (``two_kernels``).

    The grids of ``two_kernels`` are the most that any routing needs, so that no size need be read back from the device.
    """
    shared, row_blocks = tiles.shared_bytes(sizes.experts), sizes.row_blocks(tiles)
    if variant == "fused":
        grids = [("moe_fused", blocks)]
    else:
        first = row_blocks * ceil_div(sizes.width, tiles.bn) + sizes.token_tiles(tiles)
        grids = [("moe_gate_up", first), ("moe_down_combine", row_blocks * ceil_div(sizes.hidden, tiles.bn))]
    return [Launch(f"{name}_{dtype}", grid, tiles.threads, shared, arguments) for name, grid in grids if grid]
