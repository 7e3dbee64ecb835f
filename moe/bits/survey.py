"""What a rule looks at in one layer: its units (experts, the shared one, attention), their sizes and their features.

Shape letters: U units, E experts that own weights, B choices of bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..codecs.rtn import round_to_nearest
from ..experts import ExpertStore
from ..layer import PreparedLayer, moe_forward
from ..routing import Context, Routing
from .calibration import weight_shares
from .cosine_predictor import Fitted, fit_predictor
from .mixed_params import Mixed
from .params import CosinePredictor
from .scores import expert_outlier_scores, outlier_score, token_cosines
from .sensitivity import routed_sensitivities
from .shared import Always, store_of

if TYPE_CHECKING:
    from ..quantization import Seen

Shapes = tuple[tuple[int, int], ...]
ERROR_RULES = ("pmq", "greedy")


@dataclass(frozen=True)
class Units:
    """Some units of one layer, one entry each; a score that the rule does not ask for is None.

    ``kinds`` are ``routed``, ``shared`` and ``attention``; ``experts`` are ids, -1 for what is no routed expert.
    """

    kinds: tuple[str, ...]
    experts: tuple[int, ...]
    shapes: tuple[Shapes, ...]
    counts: tuple[float, ...] | None = None
    shares: tuple[float, ...] | None = None
    outliers: tuple[float, ...] | None = None
    errors: tuple[tuple[float, ...], ...] | None = None


@dataclass(frozen=True)
class LayerSurvey:
    """All units of ``layer``, and the predictor of its cosine with the score that it gives, where a rule wants them."""

    layer: int
    parts: tuple[Units, ...]
    cosine: float | None = None
    fitted: Fitted | None = None


@torch.no_grad()
def survey(params: Mixed, store: ExpertStore, seen: Seen, attention: Sequence[Tensor] = ()) -> LayerSurvey:
    """Return what the rule of ``params`` looks at in a layer, and nothing else.

    ``attention`` are the matrices [out, in] of the layer's attention, where they have a part in the budget.
    """
    routing = seen.router(seen.x_TH, seen.ctx)
    parts = [expert_units(params, store, routing, seen.x_TH)]
    if params.shared:
        if seen.shared is None:
            raise ValueError(f"layer {seen.layer} has no shared expert; give shared=false.")
        alone = Always(seen.shared)(seen.x_TH, Context())
        found = expert_units(params, store_of(seen.shared), alone, seen.x_TH)
        parts.append(replace(found, kinds=("shared",), experts=(-1,)))
    if attention:
        outlier = max(outlier_score(weight) for weight in attention) if params.by == "outlier" else None
        shapes = tuple((int(weight.shape[0]), int(weight.shape[1])) for weight in attention)
        scores = None if outlier is None else (outlier,)
        parts.append(Units(("attention",), (-1,), (shapes,), outliers=scores))
    if params.by != "cosine":
        return LayerSurvey(seen.layer, tuple(parts))
    fitted = _fitted(store, seen, routing)
    return LayerSurvey(seen.layer, tuple(parts), fitted.predictor.score(seen.x_TH), fitted)


def expert_units(params: Mixed, store: ExpertStore, routing: Routing, x_TH: Tensor) -> Units:
    """Return the experts of ``store`` as units: counts and shares of the traffic, and the scores of the rule."""
    owners = store.ffn_ids
    gate_up, down = store.weights(0)
    shapes = tuple((int(weight.shape[0]), int(weight.shape[1])) for weight in (gate_up, down))
    return Units(
        ("routed",) * len(owners),
        tuple(owners),
        (shapes,) * len(owners),
        _numbers(routing.counts_E, owners),
        _numbers(weight_shares(routing), owners),
        expert_outlier_scores(store) if params.by == "outlier" else None,
        _errors(params, store, routing, x_TH) if params.by in ERROR_RULES else None,
    )


def _numbers(values_E: Tensor, ids: Sequence[int]) -> tuple[float, ...]:
    return tuple(float(values_E[expert]) for expert in ids)


def _errors(params: Mixed, store: ExpertStore, routing: Routing, x_TH: Tensor) -> tuple[tuple[float, ...], ...]:
    """Return the error of the layer's output with one expert alone rounded to nearest, as MC-MoE measures it."""

    def rounded(weight: Tensor, bits: int) -> Tensor:
        return round_to_nearest(weight, params.at(bits).scheme()).dequantize()

    found_EB = routed_sensitivities(store, routing, x_TH, rounded, params.bits)
    return tuple(tuple(row) for row in found_EB.tolist())


def _fitted(store: ExpertStore, seen: Seen, routing: Routing) -> Fitted:
    """Return the predictor of the cosine between what the layer reads and what it says, without the residual."""
    said_TH = moe_forward(PreparedLayer(store, seen.router, seen.shared), seen.x_TH, routing=routing)
    return fit_predictor(seen.x_TH, token_cosines(seen.x_TH, said_TH), CosinePredictor(), seen.seed)
