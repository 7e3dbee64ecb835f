"""The plan of a case whose quantization spends one budget over several layers, made once in a worker."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor

from ..contracts import Case, make_key
from ..moe.bits.plan import Plan
from ..moe.model_plan import model_plan
from ..moe.recipe import Begun, Recipe
from .models import ModelSource
from .quality.attention import attention_maps
from .quality.language_model import language_model

MAX_PLANS = 64
_PLANS: OrderedDict[str, Plan] = OrderedDict()


def plan_for(case: Case, source: ModelSource, recipe: Recipe, begin: Callable[[int], Begun]) -> Plan | None:
    """Return the plan over the layers that the case's quantization names, or None where it plans layer by layer.

    It follows from the method and the dtype alone, not from the layers that the case runs: cases of one layer and of
    the whole model take the same bits.
    """
    params = recipe.quantization.params
    if getattr(params, "scope", "layer") != "model":
        return None
    key = make_key(
        [
            *(case.weights_sha256, case.model, case.structure, case.routing, case.quantization),
            *(case.calibration, case.seed, case.dtype),
        ]
    )
    if key not in _PLANS:

        def attention(layer: int) -> Sequence[Tensor]:
            if not params.attention:
                return ()
            model, _ = language_model(case, source)
            return [linear.weight for linear in attention_maps(model, layer).values()]

        _PLANS[key] = model_plan(recipe, begin, params.span(source.shape.moe_layers), attention, case.seed)
        if len(_PLANS) > MAX_PLANS:
            _PLANS.popitem(last=False)
    return _PLANS[key]
