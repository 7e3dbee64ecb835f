"""Union of Experts (arXiv 2503.02495) and MoHD (arXiv 2412.05644): who takes which slice of one MLP.

The routers are those of ``moe.slices``. Shape letters: H hidden, E slices, S tokens of a sequence, X = S * H.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..router import Router, RouterBundle, router_rows, seeded_normal
from ..slices import DataSelection, ExpertSelection, HiddenGroups

if TYPE_CHECKING:
    from ..layer import LayerWeights
    from ..router_params.slices import MoHD, UnionOfExperts
    from ..shapes import ModelShape

Factory = Callable[["LayerWeights", "ModelShape", int], RouterBundle]


def uoe(params: UnionOfExperts) -> Factory:
    """Return the factory; the gate over single tokens starts as the layer's own router where it has one."""

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        k = params.chosen(shape)
        router: Router
        if params.select == "expert":
            columns = params.sequence * shape.hidden
            gate_EX = seeded_normal((shape.experts, columns), columns**-0.5, seed, "uoe.gate")
            router = ExpertSelection(gate_EX, k, params.weighted)
        else:
            gate_EH = router_rows(weights, shape, seed)
            options = (params.keep, params.weighted, params.batch_norm_epsilon, params.capacity)
            router = DataSelection(gate_EH, k, *options)
        return RouterBundle(router, params.kinds(shape))

    return factory


def mohd(params: MoHD) -> Factory:
    """Return the factory; the scores start as the layer's own router where it has one."""

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        shared, k = params.active(shape)
        return RouterBundle(HiddenGroups(router_rows(weights, shape, seed), k, shared), params.kinds(shape))

    return factory
