"""MC-MoE's online dynamic pruning of a model's own top-k."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..dynamic_pruning import PruningRule, with_online_pruning
from ..router import RouterBundle
from . import topk

if TYPE_CHECKING:
    from ..layer import LayerWeights
    from ..router_params.online_pruning import OnlinePruned
    from ..shapes import ModelShape


def build(params: OnlinePruned) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory of the model's own top-k, pruned by the rule that ``params`` describe."""
    plain = topk.build(params.unpruned())
    rule = PruningRule(params.beta, params.protect, params.by, params.importance, params.rate)

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        params.kinds(shape)
        return with_online_pruning(plain(weights, shape, seed), rule)

    return factory
