"""``batched``: the weights of every (token, slot) pair are gathered and multiplied in one bmm.

This is the way of transformers' ``batched_mm``: no loop over experts and no sorting, but every pair copies its expert's
weights, which is how experts of kind ``gather`` want to be read. The copies are bounded: more pairs than fit go in
turns, of at least one pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from ..contracts import Availability, Execution, LayerSpec, Refusal
from . import plugins, rules
from .session import DenseWeights, Session, SlotExecutor, open_session

if TYPE_CHECKING:
    from torch import Tensor

    from ..moe.experts import ExpertStore

ELEMENT_SIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one weight, by dtype."""


def pair_bytes(spec: LayerSpec) -> int:
    """Return the bytes of one expert's weights: what each (token, slot) pair copies."""
    return spec.matrices * spec.hidden * spec.width * ELEMENT_SIZE[spec.dtype]


class BatchedExecutor(SlotExecutor):
    """One layer: gathered weights, two batched products, as many pairs at a time as ``limit_bytes`` holds."""

    kernels = ("aten::index", "aten::bmm", "aten::index_add_")

    def __init__(self, store: ExpertStore, spec: LayerSpec, limit_bytes: int) -> None:
        super().__init__(store, spec)
        self.weights = DenseWeights(store, spec)
        self.pairs = max(1, limit_bytes // pair_bytes(spec))

    def add_slots(self, y_TH: Tensor, x_TH: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> None:
        """Add w * f_e(x) for every slot that holds an expert."""
        token_N, slot_N = (indices_TK < self.spec.experts).nonzero(as_tuple=True)
        expert_N, weight_N = indices_TK[token_N, slot_N], weights_TK[token_N, slot_N]
        for start in range(0, len(token_N), self.pairs):
            part = slice(start, start + self.pairs)
            out_PH = self._ffn(x_TH[token_N[part]], expert_N[part]) * weight_N[part, None]
            y_TH.index_add_(0, token_N[part], out_PH.to(y_TH.dtype))

    def _ffn(self, x_PH: Tensor, expert_P: Tensor) -> Tensor:
        hidden = self.weights.gate_up[expert_P].bmm(self.hidden.input(x_PH, expert_P)[:, :, None])[:, :, 0]
        return self.weights.down[expert_P].bmm(self.hidden(hidden, expert_P)[:, :, None])[:, :, 0]

    def resident_bytes(self) -> int:
        """Return the bytes of the weights; the copies live only during a call."""
        return self.weights.nbytes


class Batched:
    """The backend."""

    def __init__(self, params: plugins.Batched) -> None:
        self.limit_bytes = params.limit_mib * 2**20
        self.call_bytes = params.call_mib * 2**20

    def availability(self) -> Availability:
        """It runs wherever torch does."""
        return rules.wherever_torch_runs()

    def supports(self, spec: LayerSpec) -> Execution | Refusal:
        """Take layers of FFN experts, forward only, with calls so small that copying their weights makes sense."""
        refused = rules.refusal(
            spec, "batched", tuple(ELEMENT_SIZE), ("ffn", "gather"), rounds_tokens=True, leaves_out=rules.MASKED
        )
        return refused or self._too_much(spec) or rules.execution(spec, ("topk",))

    def _too_much(self, spec: LayerSpec) -> Refusal | None:
        copied = (spec.tokens or 0) * spec.max_k * pair_bytes(spec)
        if copied <= self.call_bytes:
            return None
        return Refusal(
            f"batched would copy {copied / 2**30:.1f} GiB of weights per call ({spec.tokens} tokens x {spec.max_k} "
            f"slots x {pair_bytes(spec) / 2**20:.1f} MiB); use it for decode, or raise params.backend.batched.call_mib"
        )

    def load(self, layers: Mapping[int, ExpertStore], specs: Mapping[int, LayerSpec]) -> Session:
        """Load layers; dense weights in the case's dtype are used where they lie."""
        notes = f"{self.limit_bytes // 2**20} MiB of gathered weights at a time, or one pair's"
        return open_session(partial(BatchedExecutor, limit_bytes=self.limit_bytes), layers, specs, notes)
