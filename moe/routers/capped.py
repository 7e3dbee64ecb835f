"""Top-k with a capacity."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..capacity import CapacityRule, with_capacity
from ..router import Linear, Pipeline, RouterBundle, Softmax, TopK, router_rows

if TYPE_CHECKING:
    from ..layer import LayerWeights
    from ..router_params.capped import Capped
    from ..shapes import ModelShape


def build(params: Capped) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory of a linear top-k router cut to the capacity that ``params`` describe."""
    rule = CapacityRule(params.factor, params.k, params.policy, params.first_choices, params.share)

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        router = Pipeline(Linear(router_rows(weights, shape, seed)), TopK(params.k), Softmax())
        return with_capacity(RouterBundle(router, params.kinds(shape)), rule)

    return factory
