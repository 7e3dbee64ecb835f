"""GGUF block formats: the raw bytes of a matrix as llama.cpp stores them, decoded by the package ``gguf``.

``encode`` makes Q4_0, Q5_0, Q8_0, TQ2_0 and MXFP4. ``read_matrices`` takes matrices of any type that ``gguf`` decodes
(K-quants and IQ among them) out of a file and keeps their bytes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...contracts import MoebenchError, Scheme
from ..channel_stats import ChannelStats
from .params import GGUF_BLOCKS, gguf_scheme, gguf_type
from .tensor import BlockTensor, check_weight


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MoebenchError("GGUF formats need the package gguf; run pip install 'moebench[models]'.") from error
    return gguf


@dataclass(frozen=True, eq=False)
class GgufTensor(BlockTensor):
    """``blocks`` is uint8 [out, in / (weights of a block) * (bytes of a block)], exactly as in a GGUF file."""

    blocks: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return [out, in] as ``gguf`` decodes it, in float32, and then rounded to ``dtype``."""
        gguf = _gguf()
        kind = gguf.GGMLQuantizationType[gguf_type(self.scheme)]
        decoded = gguf.quants.dequantize(self.blocks.cpu().numpy(), kind)
        return torch.from_numpy(decoded).reshape(self.shape).to(self.blocks.device, dtype)


def encode(weight: Tensor, scheme: Scheme, stats: ChannelStats | None = None) -> GgufTensor:
    """Return ``weight`` [out, in] in a GGUF type, by ``gguf``'s own codec; needs no ``stats``.

    Raises ValueError where blocks do not divide the width or for NaN and infinity, MoebenchError where ``gguf`` is not
    installed or has no encoder for the type.
    """
    name = gguf_type(scheme)
    if name not in GGUF_BLOCKS:
        raise MoebenchError(f"{name} can be read but not written; encode {', '.join(GGUF_BLOCKS)}.")
    gguf = _gguf()
    kind = gguf.GGMLQuantizationType[name]
    check_weight(weight, name, gguf.GGML_QUANT_SIZES[kind][0])
    blocks = gguf.quants.quantize(weight.float().contiguous().cpu().numpy(), kind)
    return GgufTensor(scheme, (weight.shape[0], weight.shape[1]), torch.from_numpy(blocks).to(weight.device))


@cache
def decodable() -> dict[str, tuple[int, int]]:
    """Return the types that ``gguf`` decodes, each with the weights and the bytes of a block."""
    gguf = _gguf()
    found = {}
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.quants.dequantize(torch.zeros(1, size, dtype=torch.uint8).numpy(), kind)
        except NotImplementedError:
            continue
        found[kind.name] = (block, size)
    return found


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


def read_matrices(file: Path, names: Collection[str]) -> dict[str, tuple[GgufTensor, ...]]:
    """Return tensors of a GGUF file by name with their bytes kept: one matrix, or one per expert of a 3-D tensor.

    Raises MoebenchError for a name that the file has not, a tensor of another rank, or a type without a decoder.
    """
    stored = {tensor.name: tensor for tensor in _gguf().GGUFReader(file).tensors if tensor.name in names}
    for name in names:
        if name not in stored:
            raise MoebenchError(f"{file} has no tensor '{name}'; name one that it has, or fetch the model again.")
    return {name: _matrices(stored[name]) for name in names}


def _matrices(stored: Any) -> tuple[GgufTensor, ...]:
    """Return the matrices of one tensor of a reader; its shape lists the innermost dimension first."""
    if len(stored.shape) not in (2, 3):
        raise MoebenchError(f"'{stored.name}' is no matrix; name a tensor of two or three dimensions.")
    rows = int(stored.shape[1])
    blocks = torch.from_numpy(stored.data.copy()).view(torch.uint8).reshape(-1, rows, stored.n_bytes // _rows(stored))
    return tuple(from_blocks(matrix, stored.tensor_type.name) for matrix in blocks)


def _rows(stored: Any) -> int:
    """Return the rows of all matrices of one tensor."""
    rows = 1
    for size in stored.shape[1:]:
        rows *= int(size)
    return rows
