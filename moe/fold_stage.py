"""The fold stage of a recipe: between structure and quantization a layer may take another form of the same function.

A quantization whose parameters say ``fold`` names a ``FoldStep``. What it folds into the weights that read the layer's
input is a factor of that input (``LayerWeights.input_scale_H``); the router reads the input itself, so that a gate that
is not rounded decides exactly as before. Shape letters: T tokens, H hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..contracts import MoebenchError, Scheme
from .artefacts import Artefact
from .codecs.integer import IntTensor
from .layer import LayerWeights, scaled_input
from .router import Router, RouterBundle
from .routing import Context, Routing


@dataclass(frozen=True, eq=False)
class FoldedLayer:
    """A layer that gives what the layer it was made of gives, but for a rounded gate.

    ``weights.input_scale_H`` [H] float64 is what its experts' inputs take. Where the gate was rounded, ``gate`` is its
    packed weight for these scaled inputs, and ``weights.router_EH`` what it comes to for the inputs themselves.
    ``short`` counts the experts that lack calibration tokens, None where none were drawn for balance.
    """

    weights: LayerWeights
    gate: IntTensor | None = None
    short: int | None = None


FoldStep = Callable[[Any, LayerWeights, Routing, Tensor, int, int], FoldedLayer]
"""From parameters, a layer, the routing of its calibration inputs x_TH (float32), these, the most experts that a token
can have, and a seed, to the folded layer."""


class Unscaled(Router):
    """A router that is shown what the experts read, and decides by the layer's input that this was made of."""

    def __init__(self, router: Router, scale_H: Tensor) -> None:
        super().__init__()
        self.router, self.scale_H = router, scale_H
        self.needs, self.causal, self.scope = router.needs, router.causal, router.scope

    def forward(self, x_TH: Tensor, ctx: Context) -> Routing:
        """Return the router's Routing of x / scale."""
        routing: Routing = self.router(scaled_input(x_TH, 1 / self.scale_H), ctx)
        return routing


def check_rescaled(weights: LayerWeights, bundle: RouterBundle, routing: str) -> None:
    """Refuse routings that would take what the experts read for the layer's input."""
    what = "looks into the experts" if "experts" in bundle.router.needs else ""
    if bundle.shared is not None and weights.shared is None:
        what = "keeps an expert of its own always on"
    if set(bundle.kinds) != {"ffn"}:
        what = "has other experts than FFNs"
    if what:
        raise MoebenchError(
            f"routing '{routing}' {what}, and the recipe rescales what experts read; use axes.routing=topk."
        )


def check_rounded(bundle: RouterBundle, router_EH: Tensor, routing: str) -> None:
    """Refuse routings whose router was made of the rounded gate ``router_EH`` and does not score by it."""
    rows = [p for p in bundle.router.parameters() if p.shape == router_EH.shape]
    if not any(torch.equal(p.detach().float(), router_EH.float()) for p in rows):
        raise MoebenchError(
            f"routing '{routing}' does not score by the layer's own gate, so its gate cannot be rounded; "
            f"use params.quantization.eaquant.router=null."
        )


# --- as an artefact and back -----------------------------------------------------------------------------------------

GATE = "gate."
"""What the names of a packed gate's parts begin with."""


def with_gate(weights: Artefact, made: FoldedLayer) -> Artefact:
    """Return ``weights``, the artefact of the folded weights, with the packed gate beside them."""
    meta: dict[str, Any] = {"weights": weights.meta, "short": made.short, "gate": None}
    if made.gate is None:
        return Artefact(weights.tensors, meta)
    meta["gate"] = {"scheme": made.gate.scheme, "shape": made.gate.shape}
    return Artefact({**weights.tensors, **{GATE + name: part for name, part in made.gate.parts().items()}}, meta)


def gate_of(artefact: Artefact) -> tuple[Artefact, IntTensor | None]:
    """Return the artefact of the weights and the packed gate of ``with_gate``."""
    parts = {name.removeprefix(GATE): t for name, t in artefact.tensors.items() if name.startswith(GATE)}
    own = {name: t for name, t in artefact.tensors.items() if not name.startswith(GATE)}
    weights, told = Artefact(own, artefact.meta["weights"]), artefact.meta["gate"]
    if told is None:
        return weights, None
    rows, columns = told["shape"]
    return weights, IntTensor.of(parts, Scheme(**told["scheme"]), (rows, columns))
