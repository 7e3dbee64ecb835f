"""One layer whose experts are brought by a store: computed as they come, added up in the order of their ids.

The order of adding makes the output that of backend ``eager``, bit for bit, whoever was in the cache. Shape letters:
T tokens, H hidden, I inputs of a matrix, E experts, N assignments (of one expert, in ``_output``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ...contracts import LayerSpec, MoebenchError
from ..packed import Products
from ..session import Described, SortedExecutor, torch_dtype
from .asking import Asking, Owed, Served

if TYPE_CHECKING:
    from torch import Tensor

    from ...moe.channels import Sparsity


@dataclass(frozen=True)
class Facts:
    """What is known of a layer's experts without their weights (``session.Described``)."""

    kinds: tuple[str, ...]
    activation: str
    gated: bool
    sparsity: Sparsity | None
    act_bits: int | None


class OffloadExecutor(SortedExecutor):
    """One layer: two matrix products for every expert that has tokens, in the order in which experts come."""

    kernels = ("aten::linear", "aten::index_add_")

    def __init__(self, layer: int, facts: Described, spec: LayerSpec, asking: Asking) -> None:
        super().__init__(facts, spec)
        import torch
        import torch.nn.functional as nnf

        self.layer, self.asking, self.dtype = layer, asking, torch_dtype(spec.dtype)
        self.linear, self.in_place = nnf.linear, Products()
        self.tensor, self.grad_enabled = torch.Tensor, torch.is_grad_enabled

    def add_sorted(self, y_TH: Tensor, x_TH: Tensor, token_N: Tensor, offsets_E1: Tensor, weight_N: Tensor) -> None:
        """Add w * f_e(x) in the order of the experts' ids, and what the layer before deferred."""
        if self.grad_enabled() and (x_TH.requires_grad or weight_N.requires_grad):
            raise MoebenchError("offload has no backward; call it under torch.no_grad(), or use the eager backend.")
        with self._no_grad():
            self.asking.begin(self.layer, y_TH)
            offsets, outputs, owed = offsets_E1.tolist(), {}, {}
            spans = {e: slice(start, stop) for e, (start, stop) in enumerate(pairwise(offsets)) if stop > start}
            for served in self.asking.serve(self.layer, offsets, weight_N.tolist()):
                expert = served.key[1]
                mine = spans.pop(expert)
                out_NH = self._output(x_TH[token_N[mine]], weight_N[mine, None], served)
                if served.event.how == "deferred" and self.asking.may_defer(self.layer):
                    owed[expert] = Owed(token_N[mine].clone(), len(x_TH), out_NH)
                else:
                    outputs[expert] = (token_N[mine], out_NH)
            for _, (mine_N, out_NH) in sorted(outputs.items()):
                y_TH.index_add_(0, mine_N, out_NH.to(y_TH.dtype))
            late = {e: self._late(x_TH, token_N[mine], weight_N[mine, None]) for e, mine in spans.items()}
            self.asking.owe(self.layer, owed | late)

    def _late(self, x_TH: Tensor, token_N: Tensor, weight_N1: Tensor) -> Owed:
        """Return what an expert left out will add; its inputs are copied, since the caller's may change till then."""
        return Owed(token_N.clone(), len(x_TH), None, partial(self._output, x_TH[token_N], weight_N1.clone()))

    def _output(self, x_NH: Tensor, weight_N1: Tensor, served: Served) -> Tensor:
        """Return w * f_e(x) [N, H]."""
        gate_up, down, expert = served.gate_up, served.down, served.key[1]
        if served.event.how == "in_place":
            multiply: Any = self.in_place
        else:
            multiply, gate_up, down = self.linear, self._dense(gate_up), self._dense(down)
        out_NH = self.hidden.ffn(x_NH, lambda x_NI: multiply(x_NI, gate_up), lambda x_NI: multiply(x_NI, down), expert)
        return out_NH * weight_N1

    def _dense(self, weight: Any) -> Tensor:
        """Return a matrix in the case's dtype, as ``ExpertStore.dense`` makes it."""
        plain = isinstance(weight, self.tensor)
        dense: Tensor = weight.to(self.dtype) if plain else weight.dequantize(self.dtype)
        return dense

    def resident_bytes(self) -> int:
        """Return the bytes that all layers of the session hold in memory: its slots are shared."""
        return self.asking.store.resident_bytes()
