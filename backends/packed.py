"""``packed``: int8 and int4 codes as they are stored, multiplied by torch's own packed CPU kernels.

Activations are bfloat16. int8 reads codes [out, in] with one scale a row; int4 reads codes laid out anew at load time,
with a scale and an offset for each row and group: w = (q - 8) * scale + zero. Experts of one layer may differ: each
goes to the kernel for its codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..contracts import Availability, Execution, LayerSpec, Refusal
from . import rules
from .packing import PackedMatrix, pack_experts, unpackable
from .session import LoopExecutor, Session, open_session

if TYPE_CHECKING:
    from torch import Tensor

    from ..moe.experts import ExpertStore

MATMULS = ("aten.mm.default", "aten.addmm.default", "aten.bmm.default", "aten.linear.default", "aten.matmul.default")
"""Operators that would betray dequantized weights."""


class PackedExecutor(LoopExecutor):
    """One layer: two packed products for every expert that has tokens."""

    packed = True

    def __init__(self, store: ExpertStore, spec: LayerSpec) -> None:
        super().__init__(store, spec)
        import torch

        self.int8_mm = torch.ops.aten._weight_int8pack_mm.default
        self.int4_mm = torch.ops.aten._weight_int4pack_mm_for_cpu.default
        self.experts = pack_experts(store, spec)
        used = dict.fromkeys(matrix.kernel for pair in self.experts for matrix in pair)
        self.kernels = (*used, "aten::index_add_")

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


class Packed:
    """The backend."""

    def availability(self) -> Availability:
        """It runs wherever torch does."""
        return Availability(True)

    def supports(self, spec: LayerSpec) -> Execution | Refusal:
        """Take layers of quantized FFN experts in bfloat16, forward only; each expert must have a kernel."""
        reason = unpackable(spec)
        refused = Refusal(reason) if reason else rules.refusal(spec, "packed", ("bfloat16",))
        return refused or rules.execution(spec, ("topk", "sorted"), packed=True, excludes=MATMULS)

    def load(self, layers: Mapping[int, ExpertStore], specs: Mapping[int, LayerSpec]) -> Session:
        """Load layers: codes are laid out for the kernels once."""
        return open_session(PackedExecutor, layers, specs)


def create(params: object) -> Packed:
    """Return the backend; it has no parameters."""
    return Packed()
