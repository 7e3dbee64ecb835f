"""One kernel as a backend would launch it for a layer, compiled for a target that need not be here."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..kernels.cpu.build import cache_root
from ..kernels.cuda import layer as cuda
from ..kernels.cuda.nvrtc import Source, compile_source
from ..kernels.isa import Code
from ..kernels.targets import Target
from ..moe.shapes import ModelShape
from .static_kernels import parse_tile

if TYPE_CHECKING:
    from ..kernels.triton.tiles import Tiles


def cuda_code(kernel: str, shape: ModelShape, dtype: str, target: Target) -> Code:
    """Return a kernel of ``moe.cuh`` with its own tiles, compiled by NVRTC."""
    tiles = cuda.Tiles()
    binary = compile_source(Source.read(cuda.SOURCE, (*tiles.options, cuda.ONLY[dtype])), target.name)
    return Code(f"{kernel}_{dtype}", target, tiles.threads, tiles.shared_bytes(shape.experts), binary)


def triton_code(kernel: str, tile: str, shape: ModelShape, tokens: int, dtype: str, target: Target) -> Code:
    """Return a Triton kernel as it is launched for ``tokens`` of a layer of ``shape``, on tensors without data."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache_root() / "triton"))
    from triton.backends.compiler import GPUTarget

    from ..kernels.triton.launch import compiling

    with compiling(GPUTarget("cuda" if target.platform == "CUDA" else "hip", target.arch, target.warp)) as launches:
        _Calls(shape, tokens, dtype, parse_tile(tile)).launch(kernel)
    name = f"{kernel.removesuffix('_atomic')}_kernel"
    made = next(one.binary for one in launches if one.name == name)
    return Code(
        name=made.metadata.name,
        target=target,
        threads=made.metadata.num_warps * target.warp,
        shared=made.metadata.shared,
        binary=made.asm.get("cubin", b""),
        text=made.asm.get("amdgcn", ""),
    )


class _Calls:
    """The launches of a layer on tensors of device ``meta``: sizes, dtypes and alignment of a real call."""

    def __init__(self, shape: ModelShape, tokens: int, dtype: str, tiles: Tiles) -> None:
        import torch

        from ..kernels.triton.grouped import Experts
        from ..kernels.triton.weights import Matrices

        def empty(*sizes: int, of: str = dtype) -> Any:
            return torch.empty(*sizes, dtype=getattr(torch, of), device="meta")

        self.tiles, self.empty = tiles, empty
        self.x_TH = empty(tokens, shape.hidden)
        self.indices_TK = empty(tokens, shape.top_k, of="int64")
        self.weights_TK = empty(tokens, shape.top_k, of="float32")
        rows = shape.width * (2 if shape.gated else 1)
        gate_up = Matrices.dense(empty(shape.experts, rows, shape.hidden))
        down = Matrices.dense(empty(shape.experts, shape.hidden, shape.width))
        self.experts = Experts(gate_up, down, shape.activation, shape.gated)

    def launch(self, kernel: str) -> None:
        """Call what launches ``kernel``, and as little besides as there can be."""
        calls: dict[str, Callable[[], object]] = {
            "count": self.blocks,
            "place": self.blocks,
            "gate_up": self.gate_up,
            "down": lambda: self.down(atomic=False),
            "down_atomic": lambda: self.down(atomic=True),
            "combine": self.combine,
            "decode_up": self.decode,
            "decode_down": self.decode,
        }
        calls[kernel]()

    def blocks(self) -> Any:
        from ..kernels.triton.dispatch import blocks_of_slots

        return blocks_of_slots(self.indices_TK, self.experts.num_experts, self.tiles)

    def gate_up(self) -> None:
        from ..kernels.triton.grouped import hidden_of

        hidden_of(self.x_TH, self.experts, self.blocks(), self.tiles)

    def down(self, atomic: bool) -> None:
        from ..kernels.triton.grouped import down_of

        slots = self.indices_TK.numel()
        hidden_NF = self.x_TH.new_empty(slots, self.experts.width)
        out = self.empty(len(self.x_TH) if atomic else slots, self.experts.hidden_size, of="float32")
        down_of(hidden_NF, self.weights_TK, out, self.experts, self.blocks(), self.tiles, atomic)

    def combine(self) -> None:
        from ..kernels.triton.combine import combine_slots

        rows_NRH = self.empty(self.indices_TK.numel(), 1, self.experts.hidden_size, of="float32")
        combine_slots(rows_NRH, self.indices_TK, self.experts.num_experts, self.x_TH.new_empty(self.x_TH.shape))

    def decode(self) -> None:
        from ..kernels.triton.decode import Slots, decoded_rows

        slots = Slots(self.indices_TK, self.weights_TK, per_token=self.indices_TK.shape[1])
        decoded_rows(self.x_TH, slots, self.experts, self.tiles)
