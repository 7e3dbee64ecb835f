"""``packed``: int8 and int4 codes as they are stored, multiplied by torch's own packed CPU kernels.

Activations are bfloat16. int8 reads codes [out, in] with one scale a row; int4 reads codes laid out anew at load time,
with a scale and an offset for each row and group: w = (q - 8) * scale + zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..contracts import Availability, Execution, LayerSpec, MoebenchError, Refusal, Scheme
from . import rules
from .session import LoopExecutor, Session, open_session

if TYPE_CHECKING:
    from torch import Tensor

    from ..moe.experts import ExpertStore

CODECS = ("rtn",)
"""Codecs whose tensors hold integer codes with scales, and so have ``unpack``, ``scales`` and ``zeros``."""

INT4_GROUPS = (32, 64, 128, 256)
BLOCK = 16
"""What the kernels want sizes to be a multiple of: int8 the input (it reads past the end else), int4 the output."""

MATMULS = ("aten.mm.default", "aten.addmm.default", "aten.bmm.default", "aten.linear.default", "aten.matmul.default")
"""Operators that would betray dequantized weights."""


@dataclass(frozen=True)
class PackedMatrix:
    """One matrix [out, in] as its kernel reads it; ``group`` None means int8."""

    codes: Tensor
    scales: Tensor
    group: int | None

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes


def pack(weight: Any) -> PackedMatrix:
    """Return a quantized matrix in the layout of the kernel for its bits."""
    import torch

    if weight.scales.dtype != torch.bfloat16:
        raise MoebenchError(f"packed reads bfloat16 scales, not {weight.scales.dtype}; quantize with bfloat16 scales.")
    if weight.scheme.bits == 8:
        return PackedMatrix(weight.unpack().to(torch.int8).contiguous(), weight.scales.reshape(-1).contiguous(), None)
    zeros = torch.zeros_like(weight.scales) if weight.zeros is None else weight.zeros
    pairs = torch.stack([weight.scales, zeros.to(weight.scales.dtype)], dim=-1).transpose(0, 1).contiguous()
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.unpack().to(torch.int32).contiguous(), 1)
    return PackedMatrix(codes, pairs, weight.scheme.group)


class PackedExecutor(LoopExecutor):
    """One layer: two packed products for every expert that has tokens."""

    packed = True

    def __init__(self, store: ExpertStore, spec: LayerSpec) -> None:
        super().__init__(store, spec)
        import torch

        self.int8_mm = torch.ops.aten._weight_int8pack_mm.default
        self.int4_mm = torch.ops.aten._weight_int4pack_mm_for_cpu.default
        self.experts = [(pack(g), pack(d)) for g, d in zip(store.gate_up, store.down, strict=True)]
        product = "_weight_int8pack_mm" if self.experts[0][0].group is None else "_weight_int4pack_mm_for_cpu"
        self.kernels = (f"aten::{product}", "aten::index_add_")

    def per_expert(self) -> Sequence[tuple[PackedMatrix, PackedMatrix]]:
        """Return (gate_up, down) of every expert, packed."""
        return self.experts

    def product(self, x_NI: Tensor, weight: PackedMatrix) -> Tensor:
        """Return x W^T [N, out] in bfloat16."""
        if weight.group is None:
            y_NO: Tensor = self.int8_mm(x_NI, weight.codes, weight.scales)
        else:
            y_NO = self.int4_mm(x_NI, weight.codes, weight.group, weight.scales)
        return y_NO

    def ffn(self, x_NH: Tensor, gate_up: Any, down: Any) -> Tensor:
        """Return f_e(x) [N, H]."""
        hidden = self.product(self.hidden.input(x_NH), gate_up)
        return self.product(self.hidden(hidden), down)

    def resident_bytes(self) -> int:
        """Return the bytes of codes and scales."""
        return sum(matrix.nbytes for pair in self.experts for matrix in pair)


def unpackable(spec: LayerSpec) -> str:
    """Return why the kernels cannot read a layer's codes, or an empty string."""
    scheme = spec.scheme
    if scheme is None:
        return "packed runs one scheme for all experts of a layer; use eager where schemes differ"
    if scheme.codec == "none":
        return "packed runs quantized weights; choose quantization=int8 or quantization=int4"
    if scheme.codec not in CODECS or scheme.bits not in (4, 8) or scheme.act_bits is not None:
        codes = f"8 or 4 bit codes of {', '.join(CODECS)}, not {scheme.codec} of {scheme.bits:g} bits"
        return f"packed reads {codes}; use eager, which runs any scheme dequantized"
    if scheme.bits == 8:
        return _unpackable_int8(spec, scheme)
    return _unpackable_int4(spec, scheme)


def _unpackable_int8(spec: LayerSpec, scheme: Scheme) -> str:
    if scheme.group is not None or not scheme.symmetric:
        return "packed reads int8 codes with one symmetric scale a row; use group=None and symmetric=true"
    if spec.hidden % BLOCK or spec.width % BLOCK:
        return f"the int8 kernel wants sizes divisible by {BLOCK}, not {spec.hidden} and {spec.width}; use eager"
    return ""


def _unpackable_int4(spec: LayerSpec, scheme: Scheme) -> str:
    if scheme.group not in INT4_GROUPS:
        return f"the int4 kernel takes groups of {', '.join(map(str, INT4_GROUPS))}, not {scheme.group}"
    if spec.hidden % scheme.group or spec.width % scheme.group:
        return f"groups of {scheme.group} do not divide the sizes {spec.hidden} and {spec.width}; use a smaller group"
    return ""


class Packed:
    """The backend."""

    def availability(self) -> Availability:
        """It runs wherever torch does."""
        return Availability(True)

    def supports(self, spec: LayerSpec) -> Execution | Refusal:
        """Take layers of equally quantized FFN experts in bfloat16, forward only."""
        reason = unpackable(spec)
        refused = Refusal(reason) if reason else rules.refusal(spec, "packed", ("bfloat16",))
        return refused or rules.execution(spec, ("topk", "sorted"), packed=True, excludes=MATMULS)

    def load(self, layers: Mapping[int, ExpertStore], specs: Mapping[int, LayerSpec]) -> Session:
        """Load layers: codes are laid out for the kernel once."""
        return open_session(PackedExecutor, layers, specs)


def create(params: object) -> Packed:
    """Return the backend; it has no parameters."""
    return Packed()
