"""``reference``: every expert in turn on the tokens that chose it, in float32 or float64; slow and plainly right."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..contracts import Availability, Execution, LayerSpec, MoebenchError, Refusal
from . import rules
from .session import DenseWeights, Session, SlotExecutor, open_session, torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..moe.experts import ExpertStore

KINDS = ("ffn", "zero", "copy", "constant")


class ReferenceExecutor(SlotExecutor):
    """One layer with experts of every kind; half precisions are computed in float32 and rounded once, at the end."""

    kernels = ("aten::linear", "aten::index_add_")

    def __init__(self, store: ExpertStore, spec: LayerSpec) -> None:
        super().__init__(store, spec)
        import torch
        import torch.nn.functional as nnf

        self.linear = nnf.linear
        self.dtype = torch.float64 if spec.dtype == "float64" else torch.float32
        self.weights = DenseWeights(_rounded(store, spec), spec, self.dtype)
        self.slots = {expert: slot for slot, expert in enumerate(store.ffn_ids)}
        self.constants = _constants(store, torch_dtype(spec.dtype), self.dtype)

    def add_slots(self, y_TH: Tensor, x_TH: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> None:
        """Add w * f_e(x), expert by expert."""
        total_TH = y_TH.new_zeros(y_TH.shape, dtype=self.dtype)
        per_expert = self.weights.per_expert()
        for expert, kind in enumerate(self.spec.kinds):
            token_N, slot_N = (indices_TK == expert).nonzero(as_tuple=True)
            if len(token_N) == 0 or kind == "zero":
                continue
            x_NH = x_TH[token_N]
            if kind == "ffn":
                gate_up, down = per_expert[self.slots[expert]]
                out_NH = self._ffn(x_NH, gate_up, down)
            elif kind == "copy":
                out_NH = x_NH.to(self.dtype)
            else:
                out_NH = self._constant(x_NH.to(self.dtype), *self.constants[expert])
            total_TH.index_add_(0, token_N, out_NH * weights_TK[token_N, slot_N, None].to(self.dtype))
        y_TH += total_TH.to(y_TH.dtype)

    def _ffn(self, x_NH: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        x_NH = self.hidden.input(x_NH).to(self.dtype)
        return self.linear(self.hidden(self.linear(x_NH, gate_up)), down)

    @staticmethod
    def _constant(x_NH: Tensor, gate_2H: Tensor, value_H: Tensor) -> Tensor:
        share_N2 = (x_NH @ gate_2H.T).softmax(-1)
        return share_N2[:, :1] * x_NH + share_N2[:, 1:] * value_H

    def resident_bytes(self) -> int:
        """Return the bytes of the weights in the computing dtype."""
        return self.weights.nbytes


def _rounded(store: ExpertStore, spec: LayerSpec) -> ExpertStore:
    """Return the store with dense weights rounded to the case's dtype: the reference may not know them better."""
    if store.quantized:
        return store
    gate_up, down = store.dense(torch_dtype(spec.dtype))
    return dataclasses.replace(store, gate_up=gate_up, down=down)


def _constants(store: ExpertStore, rounded: torch.dtype, dtype: torch.dtype) -> dict[int, tuple[Tensor, Tensor]]:
    """Return (gate_2H, value_H) by the id of each constant expert."""
    ids = [expert for expert, kind in enumerate(store.kinds) if kind == "constant"]
    if ids and store.constants is None:
        raise MoebenchError("the layer names constant experts but has no constants; give its store some.")
    if store.constants is None:
        return {}
    pairs = zip(store.constants.gate_C2H, store.constants.value_CH, strict=True)
    return {e: (g.to(rounded).to(dtype), v.to(rounded).to(dtype)) for e, (g, v) in zip(ids, pairs, strict=True)}


class Reference:
    """The backend."""

    def availability(self) -> Availability:
        """It runs wherever torch does."""
        return Availability(True)

    def supports(self, spec: LayerSpec) -> Execution | Refusal:
        """Take every layer of ffn, zero, copy and constant experts; a backward only where no weight is converted."""
        dtypes = ("float32", "float64", "bfloat16", "float16")
        if spec.backward and spec.dtype in dtypes[2:]:
            return Refusal(f"reference computes in float32, so its backward wants float32 or float64, not {spec.dtype}")
        return rules.refusal(spec, "reference", dtypes, KINDS, backward=True) or rules.execution(spec, ("topk",))

    def load(self, layers: Mapping[int, ExpertStore], specs: Mapping[int, LayerSpec]) -> Session:
        """Load layers; dense weights in the computing dtype are used where they lie."""
        return open_session(ReferenceExecutor, layers, specs)


def create(params: object) -> Reference:
    """Return the backend; it has no parameters."""
    return Reference()
