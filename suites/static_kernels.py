"""Which of our GPU kernels suite ``static`` compiles, with which tiles. Imports no torch.

The kernels are those that backends ``triton`` and ``cuda_fused`` launch; the tiles those from which they choose.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ..backends.plugins import Triton
from ..kernels.cuda.layer import Tiles as CudaTiles
from ..kernels.targets import Target
from ..kernels.triton import tiles as triton
from ..kernels.triton.tiles import Tiles
from ..moe.shapes import ModelShape
from .base import ELEMENT_SIZE

HALF = ("bfloat16", "float16")

DTYPES = {"triton": (*HALF, "float32"), "cuda_fused": HALF}
"""What each backend's kernels compute with."""


@dataclass(frozen=True)
class Kernel:
    """One kernel of a backend; ``calls`` is which calls launch it: of few tokens, of many, or both.

    ``matrices`` is how many tiles of weights a program of a grouped product holds; 0 for kernels with one tile alone.
    """

    backend: Literal["triton", "cuda_fused"]
    name: str
    calls: Sequence[Literal["few", "many"]] = ("many",)
    matrices: int = 0

    def needs(self, dtype: str) -> tuple[str, ...]:
        """Return the kinds of instructions that its code must hold: float32 is multiplied without tensor cores."""
        if self.matrices == 0 and self.backend == "triton":
            return ()
        return ("tensor", "async_copy") if dtype in HALF else ("async_copy",)


KERNELS = (
    Kernel("triton", "count"),
    Kernel("triton", "place"),
    Kernel("triton", "gate_up", matrices=2),
    Kernel("triton", "down", matrices=1),
    Kernel("triton", "down_atomic", matrices=1),
    Kernel("triton", "combine", ("few", "many")),
    Kernel("triton", "decode_up", ("few",)),
    Kernel("triton", "decode_down", ("few",)),
    Kernel("cuda_fused", "moe_fused", ("few", "many")),
    Kernel("cuda_fused", "moe_gate_up", ("few", "many")),
    Kernel("cuda_fused", "moe_down_combine", ("few", "many")),
)
"""Every kernel; those of ``triton`` are called so without ``_kernel``, and ``down_atomic`` is ``down`` that adds up."""

_TILE = re.compile(r"(\d+)x(\d+)x(\d+)-w(\d+)-s(\d+)")


def kernel_named(name: str) -> Kernel:
    """Return the kernel of this name."""
    return next(kernel for kernel in KERNELS if kernel.name == name)


def tile_text(tiles: Tiles) -> str:
    """Return tiles as cases name them."""
    return f"{tiles.block_m}x{tiles.block_n}x{tiles.block_k}-w{tiles.warps}-s{tiles.stages}"


def parse_tile(text: str) -> Tiles:
    """Return the tiles that ``text`` names, or raise ValueError."""
    found = _TILE.fullmatch(text)
    if found is None:
        raise ValueError(f"tile '{text}' is none; write it as 64x128x64-w8-s3")
    return Tiles(*map(int, found.groups()))


def calls_of(tokens: int) -> Literal["few", "many"]:
    """Return which kernels a call of ``tokens`` launches."""
    return "few" if tokens <= Triton().decode_tokens else "many"


def tiles_of(kernel: Kernel, shape: ModelShape, tokens: int, dtype: str, given: Sequence[str]) -> Iterator[str]:
    """Yield the tiles with which a backend may launch ``kernel`` for ``tokens`` of a layer, or those ``given``."""
    if kernel.backend == "cuda_fused":
        tile = CudaTiles()
        yield f"{tile.bm}x{tile.bn}x{tile.bk}-w{tile.warps_m * tile.warps_n}-s{tile.stages}"
    elif kernel.matrices == 0:
        yield tile_text(triton.DECODE if kernel.name.startswith("decode") else triton.ROWS)
    elif given:
        yield from given
    else:
        sizes = (ELEMENT_SIZE[dtype], tokens * shape.top_k, shape.experts)
        yield from map(tile_text, triton.candidates(*sizes, matrices=kernel.matrices, shared_limit=2**40))


def shipped(kernel: Kernel, tile: str) -> bool:
    """Whether a tile is one from which a backend chooses, on some target; ``suite.tile`` may name others."""
    return kernel.matrices == 0 or any(parse_tile(tile) in space for space in triton.SPACE.values())


def left_out(kernel: Kernel, tile: str, dtype: str, target: Target) -> str | None:
    """Return why no backend launches ``kernel`` with this tile on ``target``, or None where one may."""
    if kernel.matrices == 0:
        return None
    tiles = parse_tile(tile)
    if tiles in triton.BARRED.get(target.name, ()):
        return f"backends leave it out on {target.name}, where code spills; compile it with suite.tile=[{tile}]."
    needed = tiles.shared_bytes(kernel.matrices, max(ELEMENT_SIZE[dtype], 2))
    if needed <= target.shared_per_block:
        return None
    return (
        f"a block of {target.name} has {target.shared_per_block} bytes of shared memory, of which {needed} are needed."
    )
