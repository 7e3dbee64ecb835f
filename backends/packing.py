"""Which integer codes torch's packed CPU kernels read, and one matrix in the layout of its kernel.

Plans ask before any weight exists, so nothing here imports torch until a matrix is packed. Shape letters: O outputs of
a matrix, I its inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..contracts import MIXED, OWNERS, LayerSpec, MoebenchError, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from ..moe.experts import ExpertStore

CODECS = ("rtn", "gptq", "hqq")
"""Codecs whose tensors hold integer codes with scales, and so have ``unpack``, ``scales`` and ``zeros``."""

INT4_GROUPS = (32, 64, 128, 256)
BLOCK = 16
"""What the kernels want sizes to be a multiple of: int8 the input (it reads past the end else), int4 the output. The
product of two int8 leaves its output unwritten for one input channel (pytorch issue 195066), which this rules out."""

INT8 = "aten::_weight_int8pack_mm"
INT4 = "aten::_weight_int4pack_mm_for_cpu"
INT8_TOKENS = "aten::_int_mm"


@dataclass(frozen=True)
class PackedMatrix:
    """One matrix [out, in] as ``kernel`` reads it; ``group`` None means int8. ``_int_mm`` reads codes [in, out]."""

    codes: Tensor
    scales: Tensor
    group: int | None
    kernel: str

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes


def pack(weight: Any) -> PackedMatrix:
    """Return a quantized matrix in the layout of the kernel for its scheme."""
    import torch

    if weight.scales.dtype != torch.bfloat16:
        raise MoebenchError(f"packed reads bfloat16 scales, not {weight.scales.dtype}; quantize with bfloat16 scales.")
    if weight.scheme.bits == 8:
        codes_OI, scales_O = weight.unpack().to(torch.int8), weight.scales.reshape(-1).contiguous()
        if weight.scheme.act_bits is not None:
            return PackedMatrix(codes_OI.T.contiguous(), scales_O, None, INT8_TOKENS)
        return PackedMatrix(codes_OI.contiguous(), scales_O, None, INT8)
    zeros = torch.zeros_like(weight.scales) if weight.zeros is None else weight.zeros
    pairs = torch.stack([weight.scales, zeros.to(weight.scales.dtype)], dim=-1).transpose(0, 1).contiguous()
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.unpack().to(torch.int32).contiguous(), 1)
    return PackedMatrix(codes, pairs, weight.scheme.group, INT4)


def pack_experts(store: ExpertStore, spec: LayerSpec) -> list[tuple[PackedMatrix, PackedMatrix]]:
    """Return (gate_up, down) of every expert, packed; the expert of a mixture that bars it is named."""
    packed = []
    for expert, pair in zip(store.ffn_ids, zip(store.gate_up, store.down, strict=True), strict=True):
        for weight in pair:
            scheme = getattr(weight, "scheme", Scheme())
            reason = unreadable(scheme, spec)
            if reason:
                raise MoebenchError(f"expert {expert} cannot be packed: {reason}.")
        packed.append((pack(pair[0]), pack(pair[1])))
    return packed


def unpackable(spec: LayerSpec) -> str:
    """Return why the kernels cannot read a layer's codes, or an empty string; of a mixture, the first expert's why."""
    experts = [expert for expert, kind in enumerate(spec.kinds) if kind in OWNERS]
    first = {scheme: expert for expert, scheme in zip(reversed(experts), reversed(spec.schemes), strict=False)}
    for scheme in dict.fromkeys(spec.schemes or (Scheme(),)):
        reason = _mixture(scheme, spec) if scheme.codec == MIXED else unreadable(scheme, spec)
        if reason:
            return reason if spec.scheme else f"expert {first[scheme]} cannot be packed: {reason}"
    return ""


def unreadable(scheme: Scheme, spec: LayerSpec) -> str:
    """Return why no kernel reads codes of this scheme in matrices of the layer's sizes, or an empty string."""
    if scheme.codec == "none":
        return "packed runs quantized weights; choose quantization=int8 or quantization=int4"
    if scheme.codec not in CODECS or scheme.bits not in (4, 8):
        codes = f"8 or 4 bit codes of {', '.join(CODECS)}, not {scheme.codec} of {scheme.bits:g} bits"
        return f"packed reads {codes}; use eager, which runs any scheme dequantized"
    if scheme.act_bits is not None and (scheme.act_bits, scheme.bits) != (8, 8):
        return _unreadable_tokens(scheme)
    return _unreadable_int8(scheme, spec) if scheme.bits == 8 else _unreadable_int4(scheme, spec)


def _unreadable_tokens(scheme: Scheme) -> str:
    said = f"not to {scheme.act_bits} beside {scheme.bits:g}"
    return f"packed rounds tokens to 8 bits beside 8 bit codes, {said}; use eager, which runs any scheme dequantized"


def _mixture(scheme: Scheme, spec: LayerSpec) -> str:
    """Return why no mixture at all could be read: experts of 8 bits want blocks, those of 4 groups of whole blocks."""
    if scheme.act_bits not in (None, 8):
        return _unreadable_tokens(scheme)
    if spec.hidden % BLOCK or spec.width % BLOCK:
        return f"packed kernels want sizes divisible by {BLOCK}, not {spec.hidden} and {spec.width}; use eager"
    return ""


def _unreadable_int8(scheme: Scheme, spec: LayerSpec) -> str:
    if scheme.group is not None or not scheme.symmetric:
        return "packed reads int8 codes with one symmetric scale a row; use group=None and symmetric=true"
    if spec.hidden % BLOCK or spec.width % BLOCK:
        return f"the int8 kernel wants sizes divisible by {BLOCK}, not {spec.hidden} and {spec.width}; use eager"
    return ""


def _unreadable_int4(scheme: Scheme, spec: LayerSpec) -> str:
    if scheme.group not in INT4_GROUPS:
        return f"the int4 kernel takes groups of {', '.join(map(str, INT4_GROUPS))}, not {scheme.group}"
    if spec.hidden % scheme.group or spec.width % scheme.group:
        return f"groups of {scheme.group} do not divide the sizes {spec.hidden} and {spec.width}; use a smaller group"
    return ""
