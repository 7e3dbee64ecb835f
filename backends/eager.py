"""``eager``: tokens sorted by expert, then one expert after another in the case's dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..contracts import Availability, Execution, LayerSpec, Refusal
from . import rules
from .session import DenseWeights, Session, SortedExecutor, open_session

if TYPE_CHECKING:
    from torch import Tensor

    from ..moe.experts import ExpertStore

DTYPES = ("float32", "float64", "bfloat16", "float16")


class EagerExecutor(SortedExecutor):
    """One layer: two matrix products for every expert that has tokens."""

    kernels = ("aten::linear", "aten::index_add_")

    def __init__(self, store: ExpertStore, spec: LayerSpec) -> None:
        super().__init__(store, spec)
        import torch.nn.functional as nnf

        self.linear = nnf.linear
        self.weights = DenseWeights(store, spec)

    def add_sorted(self, y_TH: Tensor, x_TH: Tensor, token_N: Tensor, offsets_E1: Tensor, weight_N: Tensor) -> None:
        """Add w * f_e(x), expert by expert."""
        offsets = offsets_E1.tolist()
        for expert, (gate_up, down) in enumerate(self.weights.per_expert()):
            start, stop = offsets[expert], offsets[expert + 1]
            if start == stop:
                continue
            mine_N = token_N[start:stop]
            hidden = self.linear(self.hidden.input(x_TH[mine_N]), gate_up)
            out_NH = self.linear(self.hidden(hidden), down) * weight_N[start:stop, None]
            y_TH.index_add_(0, mine_N, out_NH.to(y_TH.dtype))

    def resident_bytes(self) -> int:
        """Return the bytes of the weights."""
        return self.weights.nbytes


class Eager:
    """The backend."""

    def availability(self) -> Availability:
        """It runs wherever torch does."""
        return Availability(True)

    def supports(self, spec: LayerSpec) -> Execution | Refusal:
        """Take every layer of FFN experts, backward included."""
        refused = rules.refusal(spec, "eager", DTYPES, backward=True)
        return refused or rules.execution(spec, ("topk", "sorted"))

    def load(self, layers: Mapping[int, ExpertStore], specs: Mapping[int, LayerSpec]) -> Session:
        """Load layers; dense weights in the case's dtype are used where they lie."""
        return open_session(EagerExecutor, layers, specs)


def create(params: object) -> Eager:
    """Return the backend; it has no parameters."""
    return Eager()
