"""DeepSeek-V3 (arXiv 2412.19437): sigmoid scores, group-limited top-k, and balance by a bias outside autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..controllers import bias_step
from ..router import Linear, Pipeline, RouterBundle, TopK, Weighter, router_rows, selection_bias, weighter
from ..routing import Routing

if TYPE_CHECKING:
    from ..layer import LayerWeights
    from ..plugins import DeepSeekV3
    from ..shapes import ModelShape


class AuxFree(Pipeline):
    """A pipeline whose selection bias follows the load: b_e += rate * sign(mean load - load_e) after each batch."""

    def __init__(self, scorer: nn.Module, selector: TopK, weighter: Weighter, update_rate: float) -> None:
        super().__init__(scorer, selector, weighter)
        self.update_rate = update_rate

    @torch.no_grad()
    def update(self, routing: Routing, signal: Any = None) -> None:
        """Move the bias of every expert one step against its load in ``routing``."""
        bias_E = self.selector.get_buffer("bias_E")
        bias_E.copy_(bias_step(bias_E, routing, self.update_rate))


def build(params: DeepSeekV3) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory of the router; the bias starts at the model's own, or at zero."""

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        selection = params.selection(shape)
        bias_E: Tensor = selection_bias(weights, shape)
        router = AuxFree(
            Linear(router_rows(weights, shape, seed)),
            TopK(selection.k, bias_E, selection.groups),
            weighter(selection),
            params.update_rate,
        )
        return RouterBundle(router, params.kinds(shape))

    return factory
