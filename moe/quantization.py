"""Weight quantization by rounding to nearest, in real packed bytes.

A weight is w = c * s + z with a signed integer code c of b bits, and a scale s (and, asymmetric, an offset z) for each
group of input channels. Scales and offsets are stored in bfloat16, which is what torch's packed CPU matmuls read, so a
packed execution and ``dequantize`` use the same numbers. Codes are chosen against the stored (rounded) scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..contracts import Scheme
from .experts import ExpertStore, QTensor


@dataclass(frozen=True, eq=False)
class IntTensor:
    """A weight matrix [out, in] of 8, 4 or 2 bit integer codes with one scale per output row and group.

    ``codes`` is int8 [out, in] for 8 bits; for b = 4 or 2 bits it is uint8 [out, ceil(in b / 8)] and holds
    q = c + 2^(b-1), the first column in the lowest bits of a byte. ``scales`` and ``zeros`` (None = symmetric) are
    [out, groups]: w = c * scale + zero, so for 4 bits w = (q - 8) * scale + zero, as torch's int4 kernels have it.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    scheme: Scheme
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros as stored."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)

    @property
    def offset(self) -> int:
        """What the stored codes exceed c by: 0 for 8 bits, 2^(b-1) for b = 4 or 2."""
        return 0 if self.codes.dtype == torch.int8 else 2 ** (int(self.scheme.bits) - 1)

    def unpack(self) -> Tensor:
        """Return the stored codes as int32 [out, in]: c in -128..127 for 8 bits, q in 0..15 or 0..3 for fewer."""
        if self.codes.dtype == torch.int8:
            return self.codes.to(torch.int32)
        bits = int(self.scheme.bits)
        parts = torch.stack([(self.codes >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], dim=-1)
        return parts.flatten(1)[:, : self.shape[1]].to(torch.int32)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return [out, in]: code * scale + zero, computed in float32 and then rounded to ``dtype``."""
        codes = self.unpack() - self.offset
        grouped: Tensor = codes.float().view(*self.scales.shape, -1) * self.scales.float()[:, :, None]
        if self.zeros is not None:
            grouped = grouped + self.zeros.float()[:, :, None]
        return grouped.flatten(1).to(dtype)


def pack_codes(q: Tensor, bits: int) -> Tensor:
    """Return q [out, in] of 0..2^bits - 1 as uint8 [out, ceil(in bits / 8)]: the first code of a byte lies lowest."""
    per_byte = 8 // bits
    q = torch.nn.functional.pad(q.to(torch.uint8), (0, -q.shape[1] % per_byte))
    packed = q[:, ::per_byte].clone()
    for place in range(1, per_byte):
        packed |= q[:, place::per_byte] << (place * bits)
    return packed


def usable_groups(group: int, *widths: int) -> str:
    """Return, as words, the groups nearest to ``group`` that divide all ``widths``."""
    common = math.gcd(*widths)
    divisors = [d for d in range(1, common + 1) if common % d == 0]
    nearest = sorted(divisors, key=lambda d: abs(math.log(d / max(group, 1))))[:4]
    return ", ".join(str(d) for d in sorted(nearest))


def check_group(group: int | None, *widths: int) -> None:
    """Refuse a group that does not divide every input width."""
    if group is not None and (group < 1 or any(width % group for width in widths)):
        named = " and ".join(str(width) for width in dict.fromkeys(widths))
        raise ValueError(f"group={group} does not divide the input width {named}; use {usable_groups(group, *widths)}.")


def quantize(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype = torch.bfloat16) -> IntTensor:
    """Return ``weight`` [out, in] rounded to nearest under ``scheme`` (8, 4 or 2 bits).

    Symmetric: s = max|w| / (2^(b-1) - 1). Asymmetric: s = (max - min) / (2^b - 1), z = min + 2^(b-1) s. With s and z
    rounded to ``scale_dtype`` (relative error u, 2^-8 for bfloat16) a weight is off by at most
    max(s / 2, u (|z| + 2^(b-1) s)): half a step inside the range of codes, and at its ends what the rounding of s and z
    cut off. That second term is below half a step but for asymmetric 8 bits (up to a step) and groups far from zero.
    Float32 scales are for measuring what bfloat16 costs.
    """
    check_group(scheme.group, weight.shape[1])
    if scheme.bits not in (2, 4, 8):
        raise ValueError(f"{scheme.bits:g} bits cannot be packed; use 2, 4 or 8.")
    top = 2 ** (int(scheme.bits) - 1)
    grouped = weight.float().reshape(weight.shape[0], -1, scheme.group or weight.shape[1])
    if scheme.symmetric:
        scales, zeros = grouped.abs().amax(-1) / (top - 1), None
    else:
        low, high = grouped.aminmax(dim=-1)
        scales = (high - low) / (2 * top - 1)
        zeros = (low + top * scales).to(scale_dtype)
    scales = scales.to(scale_dtype)
    if not bool(scales.isfinite().all()):
        raise ValueError("the weights contain NaN or infinity and cannot be quantized; repair the checkpoint.")
    codes = _codes(grouped, scales, zeros, top).flatten(1)
    stored = codes.to(torch.int8) if scheme.bits == 8 else pack_codes(codes + top, int(scheme.bits))
    return IntTensor(stored, scales, zeros, scheme, (weight.shape[0], weight.shape[1]))


def _codes(grouped: Tensor, scales: Tensor, zeros: Tensor | None, top: int) -> Tensor:
    """Return the integer codes (as floats) nearest to ``grouped`` [out, groups, group]; any will do where s is 0."""
    step = scales.float()[:, :, None]
    centred = grouped if zeros is None else grouped - zeros.float()[:, :, None]
    return (centred / torch.where(step > 0, step, torch.ones_like(step))).round().clamp(-top, top - 1)


def keep(params: Any) -> Callable[[ExpertStore], ExpertStore]:
    """Quantization ``none``: the store as it is."""
    return lambda store: store


def rtn(params: Any) -> Callable[[ExpertStore], ExpertStore]:
    """Quantization ``int8``, ``int4`` and ``int2``: every FFN expert rounded to nearest under ``params.scheme()``."""
    scheme: Scheme = params.scheme()

    def quantized(store: ExpertStore) -> ExpertStore:
        if not isinstance(store.gate_up, Tensor) or not isinstance(store.down, Tensor):
            raise ValueError("the experts are quantized already; quantize once, from dense weights.")
        check_group(scheme.group, store.gate_up.shape[2], store.down.shape[2])
        return replace(
            store,
            gate_up=tuple(quantize(weight, scheme) for weight in store.gate_up),
            down=tuple(quantize(weight, scheme) for weight in store.down),
        )

    return quantized


def stack(weights: Sequence[QTensor]) -> dict[str, Tensor] | None:
    """Return codes, scales and zeros of equal IntTensors stacked over experts; None for anything else."""
    ints = [weight for weight in weights if isinstance(weight, IntTensor)]
    if not ints or len(ints) < len(weights) or len({(weight.scheme, weight.shape) for weight in ints}) > 1:
        return None
    zeros = [weight.zeros for weight in ints if weight.zeros is not None]
    tensors = {
        "codes": torch.stack([weight.codes for weight in ints]),
        "scales": torch.stack([weight.scales for weight in ints]),
    }
    return {**tensors, "zeros": torch.stack(zeros)} if zeros else tensors


def unstack(tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> tuple[IntTensor, ...]:
    """Return the IntTensors that ``stack`` took apart."""
    zeros = tensors.get("zeros")
    return tuple(
        IntTensor(codes, tensors["scales"][slot], None if zeros is None else zeros[slot], scheme, shape)
        for slot, codes in enumerate(tensors["codes"])
    )
