"""``reference``: every expert in turn on the tokens that chose it, in float32 or float64; slow and plainly right.

Experts of kind ``gather`` are too many for turns: their rows are gathered, token by token. Experts of kind ``sequence``
read the tokens of a call as one sequence. Shape letters: T tokens, H hidden, K slots, N assignments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..contracts import Availability, Execution, LayerSpec, MoebenchError, Refusal
from . import rules
from .session import DenseWeights, Hidden, Session, SlotExecutor, open_session, torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..moe.experts import ExpertStore

KINDS = ("ffn", "zero", "copy", "constant", "gather", "sequence")

GATHER_BYTES = 2**24
"""How many bytes of gathered rows are held at a time."""


class ReferenceExecutor(SlotExecutor):
    """One layer with experts of every kind; half precisions are computed in float32 and rounded once, at the end."""

    kernels = ("aten::linear", "aten::index_add_")

    def __init__(self, store: ExpertStore, spec: LayerSpec) -> None:
        super().__init__(store, spec)
        import torch
        import torch.nn.functional as nnf

        from ..moe.attention_mixture import attend
        from ..moe.layer import stored_attention

        self.attend, self.attention = attend, stored_attention
        self.linear = nnf.linear
        self.dtype = torch.float64 if spec.dtype == "float64" else torch.float32
        self.weights = DenseWeights(_rounded(store, spec), spec, self.dtype)
        self.slots = store.slots
        self.in_turn = [(e, kind) for e, kind in enumerate(store.kinds) if kind not in ("zero", "gather")]
        self.gathered = _Gathered(store, self.weights, self.hidden) if "gather" in store.kinds else None
        self.constants = _constants(store, torch_dtype(spec.dtype), self.dtype)

    def add_slots(self, y_TH: Tensor, x_TH: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> None:
        """Add w * f_e(x), expert by expert."""
        total_TH = y_TH.new_zeros(y_TH.shape, dtype=self.dtype)
        per_expert = self.weights.per_expert() if self.in_turn else ()
        for expert, kind in self.in_turn:
            token_N, slot_N = (indices_TK == expert).nonzero(as_tuple=True)
            if len(token_N):
                out_NH = self._output(expert, kind, x_TH, token_N, per_expert)
                total_TH.index_add_(0, token_N, out_NH * weights_TK[token_N, slot_N, None].to(self.dtype))
        if self.gathered is not None:
            self.gathered.add(total_TH, x_TH, indices_TK, weights_TK)
        y_TH += total_TH.to(y_TH.dtype)

    def _output(
        self, expert: int, kind: str, x_TH: Tensor, token_N: Tensor, per_expert: Sequence[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Return f_e(x) [N, H] of an expert's tokens; an attention also reads the tokens before them."""
        if kind == "ffn":
            return self._ffn(x_TH[token_N], *per_expert[self.slots[expert]], self.slots[expert])
        if kind == "sequence":
            weights = self.attention(*per_expert[self.slots[expert]], self.spec.heads)
            return self.attend(x_TH.to(self.dtype), weights)[token_N]
        x_NH = x_TH[token_N].to(self.dtype)
        return x_NH if kind == "copy" else self._constant(x_NH, *self.constants[expert])

    def _ffn(self, x_NH: Tensor, gate_up: Tensor, down: Tensor, slot: int) -> Tensor:
        return self.hidden.ffn(
            x_NH, lambda read: self.linear(read.to(self.dtype), gate_up), lambda read: self.linear(read, down), slot
        )

    @staticmethod
    def _constant(x_NH: Tensor, gate_2H: Tensor, value_H: Tensor) -> Tensor:
        share_N2 = (x_NH @ gate_2H.T).softmax(-1)
        return share_N2[:, :1] * x_NH + share_N2[:, 1:] * value_H

    def resident_bytes(self) -> int:
        """Return the bytes of the weights in the computing dtype."""
        return self.weights.nbytes


class _Gathered:
    """The ``gather`` experts of a store: for every slot that holds one, the rows of its weights, some at a time."""

    def __init__(self, store: ExpertStore, weights: DenseWeights, hidden: Hidden) -> None:
        import torch

        self.weights, self.hidden = weights, hidden
        self.place_E1 = torch.full((store.num_experts + 1,), -1, device=weights.down.device)
        for expert, slot in store.slots.items():
            if store.kinds[expert] == "gather":
                self.place_E1[expert] = slot
        self.rows = max(1, GATHER_BYTES * len(store.slots) // max(1, weights.nbytes))

    def add(self, total_TH: Tensor, x_TH: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> None:
        """Add w * f_e(x) of every slot that holds a gather expert, in the dtype of ``total_TH``."""
        x_TH, weights_TK = self.hidden.input(x_TH).to(total_TH.dtype), weights_TK.to(total_TH.dtype)
        place_TK = self.place_E1[indices_TK]
        token_N, slot_N = (place_TK >= 0).nonzero(as_tuple=True)
        for start in range(0, len(token_N), self.rows):
            part_N, part_K = token_N[start : start + self.rows], slot_N[start : start + self.rows]
            place_N = place_TK[part_N, part_K]
            product = (self.weights.gate_up[place_N] * x_TH[part_N, None]).sum(-1)
            out_NH = (self.weights.down[place_N] * self.hidden(product)[:, None]).sum(-1)
            total_TH.index_add_(0, part_N, out_NH * weights_TK[part_N, part_K, None])


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
        return rules.wherever_torch_runs()

    def supports(self, spec: LayerSpec) -> Execution | Refusal:
        """Take layers of experts of every kind; a backward only where no weight is converted."""
        dtypes = ("float32", "float64", "bfloat16", "float16")
        if spec.backward and spec.dtype in dtypes[2:]:
            return Refusal(f"reference computes in float32, so its backward wants float32 or float64, not {spec.dtype}")
        refused = rules.refusal(
            spec, "reference", dtypes, KINDS, backward=True, rounds_tokens=True, leaves_out=rules.FEATURES
        )
        return refused or rules.execution(spec, ("topk",))

    def load(self, layers: Mapping[int, ExpertStore], specs: Mapping[int, LayerSpec]) -> Session:
        """Load layers; dense weights in the computing dtype are used where they lie."""
        return open_session(ReferenceExecutor, layers, specs)


def create(params: object) -> Reference:
    """Return the backend; it has no parameters."""
    return Reference()
