"""An MoE layer in the place of an FFN of a language model. Shape letters: T tokens, H hidden."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...contracts import Check
from ...moe.oracle import compare, reference
from ...moe.routing import Context, Routing
from ..subject import DTYPES, Subject, boundary_inputs


@dataclass(frozen=True)
class Call:
    """What one changed layer did for one window."""

    block: MoEBlock
    x_TH: Tensor
    routing: Routing
    y_TH: Tensor

    def check(self) -> Check:
        """Compare the output with the oracle's, from the same inputs and routing."""
        layer = self.block.subject.layer
        return compare(self.y_TH, reference(layer.store, self.routing, self.x_TH, layer.shared), self.x_TH.dtype)


class MoEBlock(nn.Module):
    """Router, executor and shared expert, in the case's dtype; the model around it keeps its own.

    ``calls`` is shared by the changed layers of a model: a block finds its predecessor's Routing at its end, for
    routers with a gating residual, and appends its own call. ``token_ids_T`` are those of the window to come; a router
    that draws begins each window at ``seed``.
    """

    def __init__(self, index: int, subject: Subject, executor: Any, calls: list[Call], seed: int) -> None:
        super().__init__()
        self.index, self.subject, self.executor, self.calls, self.seed = index, subject, executor, calls, seed
        self.token_ids_T = torch.empty(0, dtype=torch.int64)

    @torch.no_grad()
    def forward(self, x_BTH: Tensor) -> Tensor:
        """Return y in the shape and dtype of ``x_BTH``."""
        layer, spec = self.subject.layer, self.subject.spec
        x_TH = x_BTH.flatten(0, -2).to(DTYPES[spec.dtype])
        routing = layer.router(x_TH, self._context(len(x_TH)))
        y_TH: Tensor = self.executor(x_TH, *boundary_inputs(spec.boundary, routing, spec), out_TH=None)
        if layer.shared is not None:
            y_TH = layer.shared.added_to(y_TH, x_TH).to(x_TH.dtype)
        self.calls.append(Call(self, x_TH, routing, y_TH))
        return y_TH.to(x_BTH.dtype).view_as(x_BTH)

    def _context(self, tokens: int) -> Context:
        """Return what a window of text says: its token ids, one sequence, language alone, and the layers before."""
        layer = self.subject.layer
        once = layer.router.scope == "model" and bool(self.calls)
        return Context(
            layer=self.index,
            experts=layer.store,
            token_ids_T=self.token_ids_T,
            segment_T=torch.zeros(tokens, dtype=torch.int64),
            modality_T=torch.zeros(tokens, dtype=torch.int64),
            rng=torch.Generator().manual_seed(self.seed),
            prev=self.calls[-1].routing if self.calls else None,
            plan={self.index: self.calls[0].routing} if once else None,
        )
