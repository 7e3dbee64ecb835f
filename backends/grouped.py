"""``grouped``: two grouped products (``torch.nn.functional.grouped_mm``) over tokens sorted by expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..contracts import Availability, Execution, LayerSpec, Refusal
from . import rules
from .session import DenseWeights, Session, SortedExecutor, open_session

if TYPE_CHECKING:
    from torch import Tensor

    from ..moe.experts import ExpertStore

ALIGNED = {"float32": 4, "bfloat16": 8, "float16": 8}
"""Numbers in 16 bytes, by the dtypes that grouped_mm takes: H and F must be multiples of this."""


class GroupedExecutor(SortedExecutor):
    """One layer: gather, grouped product, activation, grouped product, weighted scatter."""

    kernels = ("aten::_grouped_mm", "aten::index_add_")

    def __init__(self, store: ExpertStore, spec: LayerSpec) -> None:
        super().__init__(store, spec)
        import torch.nn.functional as nnf

        self.grouped_mm = nnf.grouped_mm
        self.weights = DenseWeights(store, spec)

    def add_sorted(self, y_TH: Tensor, x_TH: Tensor, token_N: Tensor, offsets_E1: Tensor, weight_N: Tensor) -> None:
        """Add w * f_e(x) for all assignments at once."""
        if len(token_N) == 0:
            return
        ends_E = offsets_E1[1:]
        gate_up, down = self.weights.gate_up.transpose(1, 2), self.weights.down.transpose(1, 2)
        slot_N = self.hidden.slots(offsets_E1)
        hidden = self.grouped_mm(self.hidden.input(x_TH[token_N], slot_N), gate_up, offs=ends_E)
        out_NH = self.grouped_mm(self.hidden(hidden, slot_N), down, offs=ends_E) * weight_N[:, None]
        y_TH.index_add_(0, token_N, out_NH.to(y_TH.dtype))

    def resident_bytes(self) -> int:
        """Return the bytes of the weights."""
        return self.weights.nbytes


class Grouped:
    """The backend."""

    def availability(self) -> Availability:
        """It runs wherever torch does."""
        return rules.wherever_torch_runs()

    def supports(self, spec: LayerSpec) -> Execution | Refusal:
        """Take layers of FFN experts whose rows are whole multiples of 16 bytes, backward included."""
        refused = rules.refusal(
            spec, "grouped", tuple(ALIGNED), backward=True, rounds_tokens=True, leaves_out=rules.MASKED
        )
        if refused is None and (spec.hidden % ALIGNED[spec.dtype] or spec.width % ALIGNED[spec.dtype]):
            refused = Refusal(
                f"grouped_mm wants rows of whole 16 bytes: in {spec.dtype} a hidden size and a width divisible by "
                f"{ALIGNED[spec.dtype]}, not {spec.hidden} and {spec.width}"
            )
        return refused or rules.execution(spec, ("topk", "sorted"))

    def load(self, layers: Mapping[int, ExpertStore], specs: Mapping[int, LayerSpec]) -> Session:
        """Load layers; dense weights in the case's dtype are used where they lie."""
        return open_session(GroupedExecutor, layers, specs)


def create(params: object) -> Grouped:
    """Return the backend; it has no parameters."""
    return Grouped()
