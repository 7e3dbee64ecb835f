"""Integer codes of 1 to 7 bits as one little-endian bit stream per row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack_codes(q: Tensor, bits: int) -> Tensor:
    """Return q [out, in] of 0..2^bits - 1 as uint8 [out, ceil(in bits / 8)]: the first code of a byte lies lowest.

    Column j has bits j b .. j b + b - 1 of its row, the lowest bit of the first byte being bit 0. The row is filled up
    with zeros to whole bytes.
    """
    width = _row_bytes(q.shape[1], bits)
    if 8 % bits == 0:
        return _join(pad(q.to(torch.uint8), (0, -q.shape[1] % (8 // bits))), bits, 8 // bits)
    words = _join(pad(q.to(torch.int64), (0, -q.shape[1] % 8)), bits, 8)
    return _cut(words, 8, bits).to(torch.uint8)[:, :width].contiguous()


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Return the codes [out, columns] that ``pack_codes`` packed, as int32."""
    if 8 % bits == 0:
        return _cut(packed, bits, 8 // bits)[:, :columns].to(torch.int32)
    words = _join(pad(packed, (0, -packed.shape[1] % bits)).to(torch.int64), 8, bits)
    return _cut(words, bits, 8)[:, :columns].to(torch.int32)


def _row_bytes(columns: int, bits: int) -> int:
    return -(-columns * bits // 8)


def _join(digits: Tensor, bits: int, count: int) -> Tensor:
    """Return each ``count`` neighbours of ``digits`` [out, columns] as one number, the first of them lowest."""
    words = digits[:, ::count].clone()
    for place in range(1, count):
        words |= digits[:, place::count] << (place * bits)
    return words


def _cut(words: Tensor, bits: int, count: int) -> Tensor:
    """Return ``count`` digits of ``bits`` bits for each of ``words`` [out, columns], the lowest first."""
    digits = torch.stack([(words >> (place * bits)) & (2**bits - 1) for place in range(count)], dim=-1)
    return digits.flatten(1)
