"""The plan of a recipe whose quantization spends one budget over layers: made of all of them, kept as an artefact."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..contracts import make_key
from .artefacts import cached, tensors_sha256
from .bits.plan import Plan, plan_artefact, plan_from, plan_of
from .bits.survey import LayerSurvey, survey
from .recipe import Begun, Recipe


def model_plan(
    recipe: Recipe,
    begin: Callable[[int], Begun],
    layers: Sequence[int],
    attention: Callable[[int], Sequence[Tensor]],
    seed: int,
) -> Plan:
    """Return the bits of each of ``layers``; ``begin`` prepares a layer up to its quantization.

    ``attention`` gives a layer's matrices of attention where they have a part in the budget, otherwise none. Layers are
    looked at one after another, and twice where the plan is not there yet, so that only one is held at a time. The
    artefact's key has what every layer is known by, the routing, the quantization with its parameters, and the seed.
    """
    params = recipe.quantization.params
    origins, cache = {}, None
    for layer in layers:
        begun = begin(layer)
        cache = begun.cache
        origins[str(layer)] = {**begun.origin, "attention": tensors_sha256(attention(layer))}
    inputs = {
        "stage": "allocation",
        **recipe.quantization.identity(),
        "routing": recipe.routing.identity(),
        "layers": origins,
        "seed": seed,
    }

    def build() -> Plan:
        with torch.no_grad():
            surveys = [_surveyed(begin(layer), recipe, attention(layer)) for layer in layers]
        return plan_of(params, surveys, int(make_key([seed, "allocation"])[:15], 16))

    return cached(cache, inputs, build, plan_artefact, plan_from)


def _surveyed(begun: Begun, recipe: Recipe, attention: Sequence[Tensor]) -> LayerSurvey:
    return survey(recipe.quantization.params, begun.layer.store, begun.seen, attention)
