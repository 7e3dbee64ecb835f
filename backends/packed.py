"""``packed``: int8 and int4 codes as they are stored, multiplied by torch's own packed CPU kernels.

Activations are bfloat16. int8 reads codes [out, in] with one scale a row; int4 reads codes laid out anew at load time,
with a scale and an offset for each row and group: w = (q - 8) * scale + zero. Experts of one layer may differ: each
goes to the kernel for its codes. W8A8 rounds tokens to int8 too, multiplies integers exactly, and applies both scales
afterwards, in float32 up to the expert's output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..contracts import Availability, Execution, LayerSpec, Refusal
from . import rules
from .packing import INT8_TOKENS, PackedMatrix, pack_experts, unpackable
from .session import LoopExecutor, Session, open_session

if TYPE_CHECKING:
    from torch import Tensor

    from ..moe.experts import ExpertStore

MATMULS = ("aten.mm.default", "aten.addmm.default", "aten.bmm.default", "aten.linear.default", "aten.matmul.default")
"""Operators that would betray dequantized weights."""


class Products:
    """The products of tokens with packed matrices, by torch's operators."""

    def __init__(self) -> None:
        import torch

        from ..moe.token_codes import token_codes

        self.int8_mm = torch.ops.aten._weight_int8pack_mm.default
        self.int4_mm = torch.ops.aten._weight_int4pack_mm_for_cpu.default
        self.int_mm, self.int8 = torch.ops.aten._int_mm.default, torch.int8
        self.token_codes = token_codes

    def __call__(self, x_NI: Tensor, weight: PackedMatrix) -> Tensor:
        """Return x W^T [N, out] in bfloat16, or float32 where tokens are rounded."""
        if weight.kernel == INT8_TOKENS:
            return self.rounded(x_NI, weight)
        if weight.group is None:
            y_NO: Tensor = self.int8_mm(x_NI, weight.codes, weight.scales)
        else:
            y_NO = self.int4_mm(x_NI, weight.codes, weight.group, weight.scales)
        return y_NO

    def rounded(self, x_NI: Tensor, weight: PackedMatrix) -> Tensor:
        """Return x W^T [N, out] in float32: integers multiplied and summed exactly, then scaled by token and row."""
        codes_NI, scales_N1 = self.token_codes(x_NI, 8)
        sums_NO = self.int_mm(codes_NI.to(self.int8), weight.codes)
        y_NO: Tensor = sums_NO.float() * scales_N1 * weight.scales
        return y_NO


class PackedExecutor(LoopExecutor):
    """One layer: two packed products for every expert that has tokens."""

    packed = True

    def __init__(self, store: ExpertStore, spec: LayerSpec) -> None:
        super().__init__(store, spec)
        self.product = Products()
        self.experts = pack_experts(store, spec)
        used = dict.fromkeys(matrix.kernel for pair in self.experts for matrix in pair)
        self.kernels = (*used, "aten::index_add_")

    def per_expert(self) -> Sequence[tuple[PackedMatrix, PackedMatrix]]:
        """Return (gate_up, down) of every expert, packed."""
        return self.experts

    def ffn(self, x_NH: Tensor, gate_up: Any, down: Any, expert: int) -> Tensor:
        """Return f_e(x) [N, H]."""
        hidden = self.product(self.hidden.input(x_NH, expert), gate_up)
        return self.product(self.hidden(hidden, expert), down)

    def resident_bytes(self) -> int:
        """Return the bytes of codes and scales."""
        return sum(matrix.nbytes for pair in self.experts for matrix in pair)


class Packed:
    """The backend."""

    def availability(self) -> Availability:
        """It runs wherever torch does."""
        return Availability(True)

    def supports(self, spec: LayerSpec) -> Execution | Refusal:
        """Take layers of quantized FFN experts that all have a kernel, forward only; W8A8 in float32 too."""
        reason = unpackable(spec)
        dtypes = ("bfloat16",) if rules.act_bits(spec) is None else ("bfloat16", "float32")
        refused = (
            Refusal(reason)
            if reason
            else rules.refusal(spec, "packed", dtypes, rounds_tokens=True, leaves_out=rules.MASKED)
        )
        return refused or rules.execution(spec, ("topk", "sorted"), packed=True, excludes=MATMULS)

    def load(self, layers: Mapping[int, ExpertStore], specs: Mapping[int, LayerSpec]) -> Session:
        """Load layers: codes are laid out for the kernels once."""
        return open_session(PackedExecutor, layers, specs)


def create(params: object) -> Packed:
    """Return the backend; it has no parameters."""
    return Packed()
