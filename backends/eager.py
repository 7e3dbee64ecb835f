"""``eager``: tokens sorted by expert, then one expert after another in the case's dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..contracts import Availability, Execution, LayerSpec, Refusal
from . import rules
from .session import DenseWeights, LoopExecutor, Session, open_session

if TYPE_CHECKING:
    from torch import Tensor

    from ..moe.experts import ExpertStore

DTYPES = ("float32", "float64", "bfloat16", "float16")


class EagerExecutor(LoopExecutor):
    """One layer: two matrix products for every expert that has tokens."""

    kernels = ("aten::linear", "aten::index_add_")

    def __init__(self, store: ExpertStore, spec: LayerSpec) -> None:
        super().__init__(store, spec)
        import torch.nn.functional as nnf

        self.linear = nnf.linear
        self.weights = DenseWeights(store, spec)

    def per_expert(self) -> Sequence[tuple[Tensor, Tensor]]:
        """Return (gate_up [2F, H], down [H, F]) of every expert."""
        return self.weights.per_expert()

    def ffn(self, x_NH: Tensor, gate_up: Tensor, down: Tensor, expert: int) -> Tensor:
        """Return f_e(x) [N, H]."""
        return self.hidden.ffn(
            x_NH, lambda read: self.linear(read, gate_up), lambda read: self.linear(read, down), expert
        )

    def resident_bytes(self) -> int:
        """Return the bytes of the weights."""
        return self.weights.nbytes


class Eager:
    """The backend."""

    def availability(self) -> Availability:
        """It runs wherever torch does."""
        return rules.wherever_torch_runs()

    def supports(self, spec: LayerSpec) -> Execution | Refusal:
        """Take every layer of FFN experts, backward included."""
        refused = rules.refusal(spec, "eager", DTYPES, backward=True, rounds_tokens=True, leaves_out=rules.FEATURES)
        return refused or rules.execution(spec, ("topk", "sorted"))

    def load(self, layers: Mapping[int, ExpertStore], specs: Mapping[int, LayerSpec]) -> Session:
        """Load layers; dense weights in the case's dtype are used where they lie."""
        return open_session(EagerExecutor, layers, specs)


def create(params: object) -> Eager:
    """Return the backend; it has no parameters."""
    return Eager()
