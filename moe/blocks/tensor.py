"""What the block codecs share: tensors that know their parts, the nibbles of a byte, and two refusals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from ...contracts import Scheme
from ..codecs.packing import pack_codes


@dataclass(frozen=True, eq=False)
class BlockTensor:
    """A weight matrix [out, in] in its stored bytes. Every tensor that a subclass adds as a field is stored."""

    scheme: Scheme
    shape: tuple[int, int]

    def parts(self) -> dict[str, Tensor]:
        """Return every stored tensor by name: all that a file has to keep beside the scheme and the shape."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @classmethod
    def of(cls, parts: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> Self:
        """Return the matrix whose ``parts()`` these are."""
        return cls(scheme, shape, **parts)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts as stored."""
        return sum(part.nbytes for part in self.parts().values())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the matrix [out, in]: the exact values that every execution must use."""
        raise NotImplementedError

    def linear(self, x_TI: Tensor) -> Tensor:
        """Return x W^T [T, out] with W dequantized to the dtype of ``x_TI``: none of these codecs has a kernel here."""
        return x_TI @ self.dequantize(x_TI.dtype).T


def pack_nibbles(codes: Tensor, first: str) -> Tensor:
    """Return codes 0..15 [out, in] as uint8 [out, in / 2], the first of two in the ``low`` or the ``high`` nibble."""
    pairs = codes.reshape(codes.shape[0], -1, 2)
    return pack_codes((pairs.flip(-1) if first == "high" else pairs).flatten(1), 4)


def unpack_nibbles(packed: Tensor, first: str) -> Tensor:
    """Return the codes [out, in] that ``pack_nibbles`` took, as int64 that may index a table."""
    pair = (packed >> 4, packed & 15) if first == "high" else (packed & 15, packed >> 4)
    return torch.stack(pair, dim=-1).flatten(1).long()


def check_weight(weight: Tensor, codec: str, block: int = 1) -> None:
    """Refuse a matrix [out, in] whose width blocks do not divide, or that holds NaN or infinity."""
    width = weight.shape[1]
    if width % block:
        below = width // block * block
        widths = f"{below} or {below + block}" if below else f"{block}"
        raise ValueError(
            f"{codec} stores blocks of {block} weights, which do not divide the input width {width}; "
            f"use a width that is a multiple of {block} (the nearest: {widths}) or a codec without blocks."
        )
    if not bool(weight.isfinite().all()):
        raise ValueError("the weights contain NaN or infinity and cannot be quantized; repair the checkpoint.")


def blocks_of(weight: Tensor, block: int) -> Tensor:
    """Return ``weight`` [out, in] as float32 [out, in / block, block]."""
    return weight.float().reshape(weight.shape[0], -1, block)


def nonzero(scale: Tensor) -> Tensor:
    """Return ``scale`` with 1 in place of 0, to divide by: a block of zeros has code 0 whatever it is divided by."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))
