"""From the parameters of an allocation and what is known of the units to bits per unit. Imports no torch.

Shape letters: U units, B choices of bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

from .allocators import (
    Rule,
    greedy,
    kind_first,
    layers_drawn,
    layers_first,
    least_first,
    most_first,
    promote,
    protect,
    shuffled,
    uniform,
)
from .budget import Costs
from .params import Allocation


@dataclass(frozen=True)
class Features:
    """What the rules look at, one entry per unit; None is what nobody measured, and a rule that wants it says so.

    ``expert_U`` are expert ids within their layer, -1 for what is no routed expert. Kinds are ``routed``, ``shared``
    and ``attention``. ``cosine_U`` is that of each unit's block. ``error_UB`` are sensitivities at each choice.
    """

    layer_U: tuple[int, ...]
    expert_U: tuple[int, ...]
    kind_U: tuple[str, ...] | None = None
    count_U: tuple[float, ...] | None = None
    share_U: tuple[float, ...] | None = None
    outlier_U: tuple[float, ...] | None = None
    cosine_U: tuple[float, ...] | None = None
    error_UB: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and len(value) != len(self.layer_U):
                raise ValueError(f"{field.name} has {len(value)} entries for {len(self.layer_U)} units; give one each.")

    def subset(self, units: Sequence[int]) -> Features:
        """Return the features of some units."""
        chosen: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            chosen[field.name] = None if value is None else tuple(value[unit] for unit in units)
        return Features(**chosen)

    def known(self, name: str, by: str) -> Any:
        """Return the feature ``name``, or refuse rule ``by``, which needs it."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(
                f"allocation by '{by}' needs {name}, which was not measured; calibrate, or choose another."
            )
        return value


def allocate(params: Allocation, costs: Costs, features: Features, seed: int = 0) -> tuple[int, ...]:
    """Return the bits of each unit; their stored bits never exceed ``params.budget`` per weight.

    PMQ spends the budget of each layer in that layer; every other rule spends one budget over all units.
    """
    if params.bits != costs.choices or len(costs) != len(features.layer_U):
        raise ValueError(
            f"costs of {len(costs)} units at {costs.choices} bits do not fit {len(features.layer_U)} units at "
            f"{params.bits}; make them for the same."
        )
    absent = sorted(set(params.protected) - set(zip(features.layer_U, features.expert_U, strict=True)))
    if absent:
        layer, expert = absent[0]
        raise ValueError(
            f"protected expert {expert} of layer {layer} is no unit of this budget; name ids below "
            f"{max(features.expert_U) + 1} of layers {sorted(set(features.layer_U))}."
        )
    bits_U = [0] * len(costs)
    for units in budgets(params.by, features.layer_U):
        own, price = features.subset(units), costs.subset(units)
        bits = _protected(params, own, seed)(price, price.allowed(params.budget))
        for unit, chosen in zip(units, bits, strict=True):
            bits_U[unit] = chosen
    return tuple(bits_U)


def budgets(by: str, layer_U: Sequence[int]) -> list[list[int]]:
    """Return the units that share a budget under rule ``by``."""
    everything = list(range(len(layer_U)))
    if by != "pmq":
        return [everything]
    return [[unit for unit in everything if layer_U[unit] == layer] for layer in sorted(set(layer_U))]


def _protected(params: Allocation, features: Features, seed: int) -> Rule:
    pairs = zip(features.layer_U, features.expert_U, strict=True)
    kept = [unit for unit, pair in enumerate(pairs) if pair in params.protected]
    return protect(kept, lambda others: RULES[params.by](params, features.subset(others), seed))


def _most(params: Allocation, order: list[int]) -> Rule:
    """Return the rule that promotes at most ``params.share`` of the units, exactly as it is written."""
    return promote(order[: math.floor(Fraction(repr(params.share)) * len(order))])


def _pmq(params: Allocation, features: Features, seed: int) -> Rule:
    from .pmq import objective, pmq

    error_UB, count_U, share_U = (features.known(name, "pmq") for name in ("error_UB", "count_U", "share_U"))
    return pmq(objective(error_UB, count_U, share_U, params.alpha, params.beta, params.gamma), params.one_of_each)


RULES: dict[str, Callable[[Allocation, Features, int], Rule]] = {
    "uniform": lambda params, known, seed: uniform,
    "random": lambda params, known, seed: _most(params, shuffled(len(known.layer_U), seed)),
    "random_layers": lambda params, known, seed: promote(layers_drawn(known.layer_U, params.layers, seed)),
    "first": lambda params, known, seed: promote(layers_first(known.layer_U, params.layers)),
    "last": lambda params, known, seed: promote(layers_first(known.layer_U, params.layers, last=True)),
    "frequency": lambda params, known, seed: _most(params, most_first(known.known("count_U", "frequency"))),
    "shared": lambda params, known, seed: promote(kind_first(known.known("kind_U", "shared"), "shared")),
    "attention": lambda params, known, seed: promote(kind_first(known.known("kind_U", "attention"), "attention")),
    "outlier": lambda params, known, seed: _most(params, most_first(known.known("outlier_U", "outlier"))),
    "cosine": lambda params, known, seed: _most(params, least_first(known.known("cosine_U", "cosine"))),
    "greedy": lambda params, known, seed: greedy(known.known("error_UB", "greedy")),
    "pmq": _pmq,
}
"""The rule of each name of ``params.By``."""
