"""A shared expert as a unit of a budget: an expert store of one, whose router sends it every token.

Shape letters: T tokens, S width of the shared expert, H hidden.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..experts import ExpertStore
from ..layer import SharedExpert
from ..router import Router
from ..routing import Context, Routing


def store_of(shared: SharedExpert) -> ExpertStore:
    """Return the dense shared expert as the one expert of a store."""
    return ExpertStore(shared.gate_up[None], shared.down[None], ("ffn",), shared.activation, shared.gated)


def shared_of(shared: SharedExpert, store: ExpertStore) -> SharedExpert:
    """Return ``shared`` with the values of the weights in ``store``, in its own dtype."""
    gate_up, down = store.weights(0, shared.gate_up.dtype)
    return replace(shared, gate_up=gate_up, down=down)


class Always(Router):
    """Every token to the one expert, at the weight with which the layer adds the shared expert."""

    def __init__(self, shared: SharedExpert) -> None:
        super().__init__()
        self.shared = shared

    def forward(self, x_TH: Tensor, ctx: Context) -> Routing:
        """Return the Routing to one expert."""
        weights_T1 = self.shared.factors(x_TH)[1]
        ones_T1 = x_TH.new_ones(len(x_TH), 1) if weights_T1 is None else weights_T1
        return Routing.topk(torch.zeros(len(x_TH), 1, dtype=torch.int64), ones_T1, 1)
