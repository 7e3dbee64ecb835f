"""AdaMoE (arXiv 2406.13233): null experts, which are zero experts that top-k may choose and weights leave out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ..router import Linear, RouterBundle, grown_rows
from .moepp import NullTopK

if TYPE_CHECKING:
    from ..layer import LayerWeights
    from ..router_params.null import AdaMoE
    from ..shapes import ModelShape


def build(params: AdaMoE) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory: the layer's own router rows, and seeded ones for the null experts behind them."""

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        kinds = params.kinds(shape)
        rows_EH = grown_rows(weights, shape, seed, len(kinds) - shape.experts, "adamoe.null")
        zero_E = torch.tensor([kind == "zero" for kind in kinds])
        return RouterBundle(NullTopK(Linear(rows_EH), params.k, zero_E, 1.0), kinds)

    return factory
