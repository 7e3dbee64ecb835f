"""The top-k family: Switch, Mixtral, OLMoE, Qwen3-MoE and a model's own rule differ only in their Selection."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..router import Linear, Pipeline, RouterBundle, TopK, router_rows, selection_bias, weighter
from ..router_context import ContextPipeline
from ..router_parts import Jitter

if TYPE_CHECKING:
    from ...contracts import Selection
    from ..layer import LayerWeights
    from ..plugins import Switch
    from ..plugins import TopK as Params
    from ..router_params.ffn_only import SoftmaxTopK
    from ..shapes import ModelShape


def build(params: Params | SoftmaxTopK) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory of a linear router with the selection that ``params`` makes of the model's shape."""

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        selection = params.selection(shape)
        scorer = Linear(router_rows(weights, shape, seed))
        router = Pipeline(scorer, _selector(selection, weights, shape), weighter(selection))
        return RouterBundle(router, params.kinds(shape))

    return factory


def _selector(selection: Selection, weights: LayerWeights, shape: ModelShape) -> TopK:
    bias_E = selection_bias(weights, shape) if selection.bias else None
    return TopK(selection.k, bias_E, selection.groups)


def build_switch(params: Switch) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory of Switch: top-1 whose router sees a jittered input in training, if so told."""
    plain = build(params)
    if params.jitter == 0.0:
        return plain

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        selection = params.selection(shape)
        scorer = Jitter(Linear(router_rows(weights, shape, seed)), params.jitter)
        router = ContextPipeline(scorer, _selector(selection, weights, shape), weighter(selection), {"rng"})
        return RouterBundle(router, params.kinds(shape))

    return factory
