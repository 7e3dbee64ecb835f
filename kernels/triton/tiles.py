"""How a kernel is cut into programs: the space of tiles, and which of it a layer takes. Imports no torch, no triton.

Choosing is a pure function of sizes and of static bars: the shared memory that a tile needs, and what a compiler said
of registers that did not suffice. Nothing here is tuned by a clock: the order of preference follows from arithmetic
intensity alone, and is to be measured by whoever has a device.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ...contracts import MoebenchError


@dataclass(frozen=True)
class Tiles:
    """A program's tile: ``block_m`` assignments x ``block_n`` outputs, read in steps of ``block_k`` inputs.

    ``warps`` and ``stages`` (of the software pipeline) matter on a device alone.
    """

    block_m: int = 16
    block_n: int = 64
    block_k: int = 64
    warps: int = 4
    stages: int = 3

    def shared_bytes(self, matrices: int, element_size: int, buffers: int | None = None) -> int:
        """Return the shared memory of the pipeline: a tile of activations and ``matrices`` tiles of weights a stage.

        ``buffers`` is how many stages are held at once: ``stages`` on sm_90 and later, one less on sm_80.
        """
        held = self.stages if buffers is None else buffers
        return held * element_size * self.block_k * (self.block_m + matrices * self.block_n)


SPACE: Mapping[tuple[str, str], tuple[Tiles, ...]] = {
    ("half", "large"): (
        Tiles(128, 64, 64, 8, 3),
        Tiles(64, 128, 64, 8, 3),
        Tiles(64, 64, 64, 4, 3),
        Tiles(64, 64, 32, 4, 3),
    ),
    ("half", "small"): (
        Tiles(16, 128, 128, 4, 3),
        Tiles(16, 128, 64, 4, 3),
        Tiles(16, 64, 64, 4, 3),
        Tiles(32, 64, 64, 4, 3),
        Tiles(32, 64, 32, 4, 2),
    ),
    ("single", "large"): (Tiles(64, 64, 32, 8, 3), Tiles(64, 32, 32, 4, 3), Tiles(32, 32, 32, 4, 2)),
    ("single", "small"): (Tiles(16, 64, 64, 4, 3), Tiles(16, 64, 32, 4, 3), Tiles(16, 32, 32, 4, 2)),
}
"""The space by class of dtype (two bytes, four bytes) and by how many tokens an expert has, the best guess first.

There is no tile of 128 x 128: sums of gate and up take 255 registers a thread on sm_90, and spill on sm_80.
"""

SMALL = 32
"""Up to so many assignments per expert, on average, tiles are low: an expert's last block is half empty."""

DECODE = Tiles(1, 32, 128, 4, 2)
SPARSE_DECODE = Tiles(1, 128, 32, 4, 2)
"""Tiles of products with one token, by rows of the weights and by their columns."""

GRADIENT = Tiles(64, 64, 64, 4, 2)
"""Tiles of a weight's gradient: ``block_m`` of its rows x ``block_n`` of its columns, a block of assignments a step."""

ENOUGH_PROGRAMS, MOST_SPLITS = 256, 8
"""With fewer programs than this a product is split over its inputs, into at most so many parts."""

ROWS = Tiles(1, 256, 1, 4, 1)
INTERPRETED_ROWS = Tiles(16, 256, 1)
"""Tiles of what adds up rows, and (``block_n`` slots at a time) of what sorts slots."""


BARRED: Mapping[str, tuple[Tiles, ...]] = {
    "sm_80": (Tiles(64, 64, 32, 8, 3),),
    "sm_120": (Tiles(64, 32, 32, 4, 3),),
}
"""Tiles that a compiler could not keep in registers, by target: suite ``static`` found a product of theirs to spill.

Backend ``triton`` leaves them out. A test holds this table against docs/gpu-static.json: there, every tile of SPACE has
figures for every target or is left out, and none that is left spills. For other targets nothing is barred.
"""


def candidates(
    element_size: int, assignments: int, experts: int, matrices: int, shared_limit: int, barred: Collection[Tiles] = ()
) -> tuple[Tiles, ...]:
    """Return the tiles that a layer may take, the best guess first.

    Args:
        element_size: bytes of what the dot products read.
        assignments: how many a call has, over all ``experts``.
        matrices: tiles of weights that a program holds: 2 for gate and up, 1 for down.
        shared_limit: bytes of shared memory that a program may have on the device.
        barred: tiles that are not to be taken: those of BARRED for the target.

    Raises:
        MoebenchError: no tile fits.
    """
    size = "small" if assignments <= SMALL * experts else "large"
    space = SPACE["half" if element_size <= 2 else "single", size]
    fitting = tuple(
        tiles
        for tiles in space
        if tiles not in barred and tiles.shared_bytes(matrices, max(element_size, 2)) <= shared_limit
    )
    if not fitting:
        raise MoebenchError(f"no tile fits {shared_limit} bytes of shared memory; use another backend on this device.")
    return fitting


def splits_of(programs: int, steps: int) -> int:
    """Return into how many parts a product's ``steps`` go, where there are so few ``programs`` that a device idles."""
    return max(1, min(MOST_SPLITS, steps, ENOUGH_PROGRAMS // max(programs, 1)))


def interpreted(outputs: int, inputs: int) -> Tiles:
    """Return the tile for interpretation, whose cost is the number of programs and of their steps: few and large."""
    return Tiles(16, _power(outputs), _power(inputs))


def _power(size: int) -> int:
    """Return the power of two from 16 to 128 that covers ``size``, or 128."""
    return min(128, max(16, 1 << max(size - 1, 0).bit_length()))
