"""GGUF block formats: the raw bytes of a matrix as llama.cpp stores them, decoded by the package ``gguf``.

``encode`` makes Q4_0, Q5_0, Q8_0, TQ2_0 and MXFP4. ``read_matrices`` takes matrices of any type that ``gguf`` decodes
(K-quants and IQ among them) out of a file and keeps their bytes; ``read_dense`` decodes them.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...contracts import MoebenchError, Scheme
from ..channel_stats import ChannelStats
from .gguf_file import GgufFile, Place
from .gguf_types import bytes_of, decodable, library, open_file, type_of
from .params import GGUF_BLOCKS, gguf_scheme, gguf_type
from .tensor import BlockTensor, check_weight


@dataclass(frozen=True, eq=False)
class GgufTensor(BlockTensor):
    """``blocks`` is uint8 [out, in / (weights of a block) * (bytes of a block)], exactly as in a GGUF file."""

    blocks: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return [out, in] as ``gguf`` decodes it, in float32, and then rounded to ``dtype``."""
        gguf = library()
        kind = gguf.GGMLQuantizationType[gguf_type(self.scheme)]
        decoded = gguf.quants.dequantize(self.blocks.cpu().numpy(), kind)
        return torch.from_numpy(decoded).reshape(self.shape).to(self.blocks.device, dtype)

    def rows(self, start: int, stop: int) -> GgufTensor:
        """Return rows of the matrix, their bytes shared."""
        return GgufTensor(self.scheme, (stop - start, self.shape[1]), self.blocks[start:stop])

    def columns(self, start: int, stop: int) -> GgufTensor:
        """Return columns of the matrix, their bytes copied; ValueError where that would cut a block."""
        block = self.scheme.group or 1
        if start % block or stop % block:
            raise ValueError(f"columns {start} to {stop} cut blocks of {block}; choose multiples of that.")
        size = self.blocks.shape[1] // (self.shape[1] // block)
        blocks = self.blocks[:, start // block * size : stop // block * size].contiguous()
        return GgufTensor(self.scheme, (self.shape[0], stop - start), blocks)


def encode(weight: Tensor, scheme: Scheme, stats: ChannelStats | None = None) -> GgufTensor:
    """Return ``weight`` [out, in] in a GGUF type, by ``gguf``'s own codec; needs no ``stats``.

    Raises ValueError where blocks do not divide the width or for NaN and infinity, MoebenchError where ``gguf`` is not
    installed or has no encoder for the type.
    """
    name = gguf_type(scheme)
    if name not in GGUF_BLOCKS:
        raise MoebenchError(f"{name} can be read but not written; encode {', '.join(GGUF_BLOCKS)}.")
    gguf = library()
    kind = gguf.GGMLQuantizationType[name]
    check_weight(weight, name, gguf.GGML_QUANT_SIZES[kind][0])
    blocks = gguf.quants.quantize(weight.float().contiguous().cpu().numpy(), kind)
    return GgufTensor(scheme, (weight.shape[0], weight.shape[1]), torch.from_numpy(blocks).to(weight.device))


def from_blocks(blocks: Tensor, type_name: str) -> GgufTensor:
    """Return the matrix whose rows are the uint8 rows ``blocks`` of a GGUF type.

    Raises MoebenchError where ``gguf`` cannot decode the type, ValueError where the rows are not whole blocks.
    """
    types = decodable()
    if type_name not in types:
        known = ", ".join(sorted(types))
        raise MoebenchError(f"the installed gguf does not decode {type_name}; convert the file to one of {known}.")
    block, size = types[type_name]
    rows, row_bytes = blocks.shape
    if row_bytes % size:
        raise ValueError(f"a row of {row_bytes} bytes is not made of {type_name} blocks of {size}; repair the file.")
    return GgufTensor(gguf_scheme(type_name, block), (rows, row_bytes // size * block), blocks)


def stacked(matrices: Sequence[GgufTensor]) -> GgufTensor | None:
    """Return matrices of one type and width as one, above each other, their bytes copied; None where types differ."""
    first = matrices[0]
    if any(matrix.scheme != first.scheme for matrix in matrices):
        return None
    rows = sum(matrix.shape[0] for matrix in matrices)
    return GgufTensor(first.scheme, (rows, first.shape[1]), torch.cat([matrix.blocks for matrix in matrices]))


def read_matrices(path: Path, names: Collection[str]) -> dict[str, tuple[GgufTensor, ...]]:
    """Return tensors of a GGUF file by name with their bytes kept: one matrix, or one per expert of a 3-D tensor.

    The bytes are mapped and not copied. Raises MoebenchError for a name that the file has not, a tensor of another
    rank, a type without a decoder, or a file that ends too early.
    """
    file = open_file(path)
    return {name: _matrices(file, file.place(name)) for name in names}


def _matrices(file: GgufFile, place: Place) -> tuple[GgufTensor, ...]:
    """Return the matrices of one tensor, whose dimensions begin with the innermost."""
    if len(place.dims) not in (2, 3):
        raise MoebenchError(f"{place.name!r} is no matrix; name a tensor of two or three dimensions.")
    name, _, _ = type_of(file, place)
    blocks = _mapped(file, place).view(place.size // place.dims[0] // place.dims[1], place.dims[1], -1)
    return tuple(from_blocks(matrix, name) for matrix in blocks)


def _mapped(file: GgufFile, place: Place) -> Tensor:
    """Return the bytes of a tensor, uint8; pages of a private mapping, which no write could carry to the file."""
    size = bytes_of(file, place)
    with file.path.open("rb") as opened:
        content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    return torch.frombuffer(content, dtype=torch.uint8, count=size, offset=place.start)


def read_dense(path: Path, name: str) -> Tensor:
    """Return one tensor of any rank, outermost dimension first, as ``gguf`` decodes it, in float32; raises as above."""
    file = open_file(path)
    place = file.place(name)
    name_of_type, _, _ = type_of(file, place)  # refuses types that the library does not know
    kind = library().GGMLQuantizationType[name_of_type]
    rows = _mapped(file, place).view(place.size // place.dims[0], -1)
    decoded = torch.from_numpy(library().quants.dequantize(rows.numpy(), kind))
    return decoded.reshape(place.dims[::-1]).float()
