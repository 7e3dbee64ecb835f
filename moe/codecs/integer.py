"""A weight matrix in integer codes of 1 to 8 bits, in real packed bytes.

A weight is w = c * s + z with a signed integer code c of b bits, and a scale s (and, asymmetric, an offset z) for each
group of input channels. Scales and offsets are stored in bfloat16, which is what torch's packed CPU matmuls read, so a
packed execution and ``dequantize`` use the same numbers. Codes are chosen against the stored (rounded) scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...contracts import Scheme
from .grid import Grid
from .packing import pack_codes, unpack_codes


@dataclass(frozen=True, eq=False)
class IntTensor:
    """A weight matrix [out, in] of 1 to 8 bit integer codes with one scale per output row and group.

    ``codes`` is int8 [out, in] for 8 bits; for fewer it is uint8 [out, ceil(in b / 8)], a bit stream per row that holds
    q = c + 2^(b-1), the first column in the lowest bits of a byte. ``scales`` and ``zeros`` (None = symmetric) are
    [out, groups]: w = c * scale + zero, so for 4 bits w = (q - 8) * scale + zero, as torch's int4 kernels have it.
    One symmetric bit is a sign: w = (2 q - 1) * scale.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    scheme: Scheme
    shape: tuple[int, int]

    @classmethod
    def pack(cls, codes_OGN: Tensor, grid: Grid, scheme: Scheme) -> IntTensor:
        """Return the tensor of the codes (as floats, by groups) of ``grid``."""
        codes = codes_OGN.flatten(1)
        if grid.bits == 8:
            stored = codes.to(torch.int8)
        else:
            stored = pack_codes((codes + 1) / 2 if grid.signs else codes + 2 ** (grid.bits - 1), grid.bits)
        return cls(stored, grid.scales_OG, grid.zeros_OG, scheme, (codes.shape[0], codes.shape[1]))

    @classmethod
    def of(cls, parts: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> IntTensor:
        """Return the tensor that ``parts`` took apart."""
        return cls(parts["codes"], parts["scales"], parts.get("zeros"), scheme, shape)

    def parts(self) -> dict[str, Tensor]:
        """Return what is stored, by name: codes, scales and, asymmetric, zeros."""
        parts = {"codes": self.codes, "scales": self.scales}
        return parts if self.zeros is None else {**parts, "zeros": self.zeros}

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros as stored."""
        return sum(part.nbytes for part in self.parts().values())

    @property
    def grid(self) -> Grid:
        """The levels that the codes stand for."""
        return Grid(self.scales, self.zeros, int(self.scheme.bits))

    @property
    def offset(self) -> int:
        """What the stored codes exceed c by: 0 for 8 bits, 2^(b-1) for fewer (but see one symmetric bit)."""
        return 0 if self.codes.dtype == torch.int8 else 2 ** (int(self.scheme.bits) - 1)

    def unpack(self) -> Tensor:
        """Return the stored codes as int32 [out, in]: c in -128..127 for 8 bits, q in 0..2^b - 1 for fewer."""
        if self.codes.dtype == torch.int8:
            return self.codes.to(torch.int32)
        return unpack_codes(self.codes, int(self.scheme.bits), self.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return [out, in]: code * scale + zero, computed in float32 and then rounded to ``dtype``."""
        stored, grid = self.unpack(), self.grid
        codes = 2 * stored - 1 if grid.signs else stored - self.offset
        return grid.levels(codes.view(*self.scales.shape, -1)).flatten(1).to(dtype)

    def linear(self, x: Tensor) -> Tensor:
        """Return x W^T [.., out] for x [.., in], with the dequantized weights in the type of x."""
        return x @ self.dequantize(x.dtype).T
