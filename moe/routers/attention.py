"""BAM (arXiv 2408.08274): softmax over all attentions of a layer, which is a top-k with k = E."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..router import Linear, Pipeline, RouterBundle, Softmax, TopK, router_rows

if TYPE_CHECKING:
    from ..layer import LayerWeights
    from ..router_params.attention import BAM
    from ..shapes import ModelShape


def build(params: BAM) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory of the router."""

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        kinds = params.kinds(shape)
        return RouterBundle(Pipeline(Linear(router_rows(weights, shape, seed)), TopK(len(kinds)), Softmax()), kinds)

    return factory
