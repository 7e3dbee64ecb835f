"""An MoE layer in the place of an FFN of a language model. Shape letters: T tokens, H hidden."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...contracts import Check, Metric
from ...moe.oracle import Reference, compare, joined, reference
from ...moe.router import Router
from ...moe.routing import Context, Routing
from ...moe.sparsifiers.cost import sparsity_metrics, theoretical_cost
from ..subject import DTYPES, Subject, boundary_inputs
from .projections import AttentionCall, LayerProjections


@dataclass(frozen=True)
class Call:
    """What one changed layer did for one window.

    ``x_TH`` is what its experts read. ``error_T`` float64 is |y - y'| / |y'| of each token, y' what the dense model's
    layer makes of the same input; ``dense_routing`` what the router, its gate not rounded, says of that which the layer
    reads in the dense model. Of the first ``prefix`` tokens nothing was left out. ``attention`` is what the layer's
    attention did before, where it leaves out inputs.
    """

    block: MoEBlock
    x_TH: Tensor
    routing: Routing
    y_TH: Tensor
    error_T: Tensor
    dense_routing: Routing
    prefix: int = 0
    attention: AttentionCall | None = None

    def reference(self) -> Reference:
        """Return the oracle's output from the same inputs and routing: dense in the prefix, sparse behind it."""
        layer, prefix, tokens = self.block.subject.layer, self.prefix, len(self.x_TH)
        if prefix == 0:
            return reference(layer.store, self.routing, self.x_TH, layer.shared)
        dense = replace(layer.store, sparsity=None)
        first = reference(dense, self.routing.part(0, prefix), self.x_TH[:prefix], layer.shared)
        later = reference(layer.store, self.routing.part(prefix, tokens), self.x_TH[prefix:], layer.shared)
        return joined(first, later)

    def check(self) -> Check:
        """Compare the output with the oracle's, and so those of attention's projections that leave out inputs."""
        own = compare(self.y_TH, self.reference(), self.x_TH.dtype)
        return own if self.attention is None or not own.ok else self.attention.check(own)

    def sparsity(self) -> list[Metric]:
        """Return the densities and what they would save, over the tokens behind the dense prefix."""
        store, later = self.block.subject.layer.store, self.routing.part(self.prefix, len(self.x_TH))
        found = sparsity_metrics(store, later, self.x_TH[self.prefix :])
        if self.attention is None:
            return found
        return [*found, *self.attention.metrics(theoretical_cost(store, later, self.x_TH[self.prefix :]), later)]


class MoEBlock(nn.Module):
    """Router, executor and shared expert, in the case's dtype; the model around it keeps its own.

    ``calls`` is shared by the changed layers of a model: a block finds its predecessor's Routing at its end, for
    routers with a gating residual, and appends its own call. ``dense`` is the layer that it stands in for.
    ``token_ids_T`` are those of the window to come, ``dense_x_TH`` what the layer reads of it in the dense model (None:
    the same), ``forced`` a Routing in the place of the router's. A router that draws begins each window at ``seed``.
    ``attn`` is the attention of the window before it in its decoder layer, [1, heads, T, T], where the router reads it,
    and ``prompt`` how many of the tokens are the prompt.
    ``whole`` executes the same experts with nothing left out, for the first tokens of a window where the sparsity has
    a dense prefix; None where it has none. ``projections`` are those of the attention in its decoder layer, where
    these leave out inputs.
    """

    def __init__(
        self,
        index: int,
        subject: Subject,
        executor: Any,
        calls: list[Call],
        seed: int,
        dense: nn.Module,
        whole: Any = None,
    ) -> None:
        super().__init__()
        self.index, self.subject, self.executor, self.calls, self.seed = index, subject, executor, calls, seed
        self.dense, self.whole = dense, whole
        self.token_ids_T = torch.empty(0, dtype=torch.int64)
        self.dense_x_TH: Tensor | None = None
        self.forced: Routing | None = None
        self.attn: Tensor | None = None
        self.prompt: int | None = None
        self.projections: LayerProjections | None = None

    @torch.no_grad()
    def forward(self, x_BTH: Tensor) -> Tensor:
        """Return y in the shape and dtype of ``x_BTH``."""
        x_TH = x_BTH.flatten(0, -2).to(DTYPES[self.subject.spec.dtype])
        before = [call.routing for call in self.calls]
        routing = self.route(x_TH, before) if self.forced is None else self.forced
        read_TH = self.subject.layer.reads(x_TH)
        y_TH = self.computed(read_TH, routing)
        error_T = relative_error(y_TH, self.dense(x_BTH).flatten(0, -2))
        dense_routing, prefix = self._dense_routing(x_TH, routing), self.prefix(len(x_TH))
        self.calls.append(Call(self, read_TH, routing, y_TH, error_T, dense_routing, prefix, self.attended()))
        return y_TH.to(x_BTH.dtype).view_as(x_BTH)

    def computed(self, x_TH: Tensor, routing: Routing) -> Tensor:
        """Return the output of the experts that read ``x_TH``, the shared one among them, in its dtype."""
        layer, spec, prefix = self.subject.layer, self.subject.spec, self.prefix(len(x_TH))
        y_TH: Tensor = self.executor(x_TH, *boundary_inputs(spec.boundary, routing, spec), out_TH=None)
        if prefix:
            first = boundary_inputs(spec.boundary, routing.part(0, prefix), spec)
            y_TH = torch.cat([self.whole(x_TH[:prefix], *first, out_TH=None), y_TH[prefix:]])
        return y_TH if layer.shared is None else layer.shared.added_to(y_TH, x_TH).to(x_TH.dtype)

    def prefix(self, tokens: int) -> int:
        """Return how many of the first of ``tokens`` have nothing left out by the experts."""
        return 0 if self.whole is None else self.first_tokens(tokens)

    def first_tokens(self, tokens: int) -> int:
        """Return how many of the first of ``tokens`` the dense prefix of the sparsity covers."""
        spec = self.subject.spec.sparsity
        return 0 if spec is None else math.ceil(spec.dense_prefix * tokens)

    def attended(self) -> AttentionCall | None:
        """Return what the attention before this layer did last, where it leaves out inputs."""
        return None if self.projections is None else self.projections.call()

    def _dense_routing(self, x_TH: Tensor, routing: Routing) -> Routing:
        layer = self.subject.layer
        if self.forced is not None or (self.dense_x_TH is None and layer.gate is None):
            return routing
        x_TH = x_TH if self.dense_x_TH is None else self.dense_x_TH.to(DTYPES[self.subject.spec.dtype])
        return self.route(x_TH, [call.dense_routing for call in self.calls], layer.exact_router)

    def route(self, x_TH: Tensor, before: Sequence[Routing], router: Router | None = None) -> Routing:
        """Ask the router (another where one is given), with what a window of text says: token ids, one sequence,
        language alone, and the layers ``before``."""
        layer = self.subject.layer
        router = layer.router if router is None else router
        once = router.scope == "model" and bool(before)
        ctx = Context(
            layer=self.index,
            experts=layer.store,
            token_ids_T=self.token_ids_T,
            segment_T=torch.zeros(len(x_TH), dtype=torch.int64),
            modality_T=torch.zeros(len(x_TH), dtype=torch.int64),
            rng=torch.Generator().manual_seed(self.seed),
            attn=self.attn,
            prompt=self.prompt,
            prev=before[-1] if before else None,
            plan={self.index: before[0]} if once else None,
        )
        routing: Routing = router(x_TH, ctx)
        return routing


def relative_error(found_TH: Tensor, expected_TH: Tensor) -> Tensor:
    """Return |found - expected| / |expected| of each row, [T] float64; 0 where both are nothing."""
    off_T = (found_TH.double() - expected_TH.double()).norm(dim=1)
    error_T: Tensor = off_T / expected_TH.double().norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
    return error_T
