"""One budget over the layers of a model: from the surveys of its layers to the bits of each layer's units.

Shape letters: U units of all layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..artefacts import Artefact
from .allocate import Features, allocate
from .budget import Costs
from .mixed_params import Mixed
from .params import LayerBits
from .survey import LayerSurvey


@dataclass(frozen=True)
class Plan:
    """The bits of every layer, what they ``cost`` in stored bits per weight, and ``facts`` found on the way.

    The facts of rule ``cosine`` are the mean squared error of its predictors on held-out tokens, the least of all
    epochs since these tokens also stop the training (``predictor_error``), and the variance of what they predict
    (``predictor_variance``), means over the layers.
    """

    layers: Mapping[int, LayerBits]
    cost: float
    facts: Mapping[str, float]


def plan_of(params: Mixed, surveys: Sequence[LayerSurvey], seed: int) -> Plan:
    """Return the plan of ``params`` for the surveyed layers; ``seed`` decides what is drawn."""
    costs = Costs.of(
        [params.at(bits).scheme() for bits in params.bits],
        [shapes for survey in surveys for part in survey.parts for shapes in part.shapes],
    )
    bits_U = allocate(params.allocation(), costs, _features(surveys), seed)
    spent = iter(bits_U)
    layers = {
        survey.layer: _layer_bits(survey, [next(spent) for part in survey.parts for _ in part.kinds])
        for survey in surveys
    }
    return Plan(layers, costs.average(bits_U), _facts(surveys))


def _layer_bits(survey: LayerSurvey, bits_U: Sequence[int]) -> LayerBits:
    kinds = [kind for part in survey.parts for kind in part.kinds]
    found = {kind: tuple(bits for bits, own in zip(bits_U, kinds, strict=True) if own == kind) for kind in set(kinds)}
    shared, attention = (found.get(kind, (None,))[0] for kind in ("shared", "attention"))
    return LayerBits(found["routed"], shared, attention)


def _features(surveys: Sequence[LayerSurvey]) -> Features:
    parts = [(survey, part) for survey in surveys for part in survey.parts]

    def joined(name: str) -> Any:
        """Return a score of all units, or None where some have none."""
        values = [getattr(part, name) for _, part in parts]
        return None if None in values else tuple(one for value in values for one in value)

    cosines = [survey.cosine for survey, part in parts for _ in part.kinds if survey.cosine is not None]
    return Features(
        tuple(survey.layer for survey, part in parts for _ in part.kinds),
        joined("experts"),
        joined("kinds"),
        joined("counts"),
        joined("shares"),
        joined("outliers"),
        tuple(cosines) or None,
        joined("errors"),
    )


def _facts(surveys: Sequence[LayerSurvey]) -> dict[str, float]:
    fitted = [survey.fitted for survey in surveys if survey.fitted is not None]
    if not fitted:
        return {}
    return {
        "predictor_error": sum(one.held_out_error for one in fitted) / len(fitted),
        "predictor_variance": sum(one.held_out_variance for one in fitted) / len(fitted),
    }


# --- as an artefact and back -----------------------------------------------------------------------------------------


def plan_artefact(plan: Plan) -> Artefact:
    """Return the plan as JSON values; it has no tensors."""
    layers = {str(layer): asdict(bits) for layer, bits in plan.layers.items()}
    return Artefact({}, {"layers": layers, "cost": plan.cost, "facts": dict(plan.facts)})


def plan_from(artefact: Artefact) -> Plan:
    """Return the Plan of ``plan_artefact``."""
    layers = {
        int(layer): LayerBits(tuple(told["experts"]), told["shared"], told["attention"])
        for layer, told in artefact.meta["layers"].items()
    }
    return Plan(layers, artefact.meta["cost"], artefact.meta["facts"])
