"""A model's own top-k with the outputs of listed experts zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..dropping import with_dropping
from ..router import RouterBundle
from . import topk

if TYPE_CHECKING:
    from ..layer import LayerWeights
    from ..router_params.dropping import Dropped
    from ..shapes import ModelShape


def build(params: Dropped) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory of the model's own top-k without the listed experts."""
    plain = topk.build(params.whole())

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        params.kinds(shape)
        return with_dropping(plain(weights, shape, seed), params.experts)

    return factory
