"""``symmetric.cuh`` as Python calls it: one layer over several devices, a launch of each at the same time.

Imports no torch. Letters as in ``layer``; P devices ("peers"), E experts of all of them.
"""

from __future__ import annotations

from ctypes import c_int32, c_void_p
from dataclasses import dataclass

from .layer import DTYPES, Tiles, ceil_div

ROUNDS, STAGES = 2, 2
"""Rows go out in round 0 and results come back in round 1; stage 0 is a device's own, stage 1 is written by others."""

POINTERS = (
    "x_TH",
    "gate_up",
    "down_EHF",
    "token_N",
    "offsets_E1",
    "weight_N",
    "hidden_NF",
    "order_N",
    "spans_T2",
    "state",
    "finished",
    "expected",
    "buffers",
    "flags",
    "out_TH",
)
SIZES = ("tokens", "experts", "hidden", "width", "activation", "gated", "ranks", "rank", "capacity")

ARGUMENTS: dict[str, type] = {**dict.fromkeys(POINTERS, c_void_p), **dict.fromkeys(SIZES, c_int32)}

SIGNATURES = {f"moe_symmetric_{dtype}": tuple(ARGUMENTS.values()) for dtype in DTYPES}


@dataclass(frozen=True)
class Shape:
    """The buffer [P][rounds][stages][experts of a device][capacity][H] that every device owns.

    After FlashMoE (arXiv 2506.04667): device p alone writes the cells (p, ..) of any device, in stage 0 of its own and
    in stage 1 of another's. ``capacity`` is the most rows that one device sends to one expert.
    """

    peers: int
    experts: int
    capacity: int
    hidden: int

    @property
    def numbers(self) -> int:
        """Length of the buffer, in elements."""
        return self.peers * ROUNDS * STAGES * self.experts * self.capacity * self.hidden

    def offset(self, peer: int, round_: int, stage: int, expert: int, slot: int) -> int:
        """Return where a row begins, in elements."""
        cell = ((peer * ROUNDS + round_) * STAGES + stage) * self.experts + expert
        return (cell * self.capacity + slot) * self.hidden

    def units(self, tiles: Tiles) -> int:
        """Return the most row blocks that a device may receive."""
        return self.peers * self.experts * ceil_div(self.capacity, tiles.bm)
