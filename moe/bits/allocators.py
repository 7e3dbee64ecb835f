"""Rules that spend a budget of bits: pure functions on numbers, from costs and scores to bits per unit. No torch.

Most are an order in which units are promoted: everything starts at the widest choice that all units can afford alike,
and is raised to the widest choice in that order while the budget lasts (QuantMoE-Bench, arXiv 2406.08155: 2 bits, and 4
for the promoted; here the choices say which). Ties go to the lower unit, so that every rule is deterministic.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence

from .budget import Costs

Rule = Callable[[Costs, int], tuple[int, ...]]
"""From costs and the stored bits allowed, which the cheapest choice does not exceed, to bits per unit."""


# --- spending --------------------------------------------------------------------------------------------------------


def uniform(costs: Costs, allowed: int) -> tuple[int, ...]:
    """Return the widest one choice for all units within ``allowed`` stored bits."""
    fitting = [bits for bits in costs.choices if costs.total([bits] * len(costs)) <= allowed]
    if not fitting:
        raise ValueError(f"{allowed} stored bits are less than {costs.choices[0]} bits for all take; raise the budget.")
    return (fitting[-1],) * len(costs)


def promote(order: Sequence[int]) -> Rule:
    """Return the rule that raises units in ``order``, each to the widest choice that the rest of the budget pays.

    Units that ``order`` leaves out stay at the uniform choice. A unit too large for what is left is passed over.
    """

    def rule(costs: Costs, allowed: int) -> tuple[int, ...]:
        bits_U = list(uniform(costs, allowed))
        left = allowed - costs.total(bits_U)
        for unit in order:
            old = costs.cost(unit, bits_U[unit])
            bits_U[unit] = max(bits for bits in costs.choices if costs.cost(unit, bits) - old <= left)
            left -= costs.cost(unit, bits_U[unit]) - old
        return tuple(bits_U)

    return rule


def greedy(error_UB: Sequence[Sequence[float]]) -> Rule:
    """Return the rule that starts at the fewest bits and always takes the step that removes most error per stored bit.

    A step may skip choices. Where errors fall convexly with the bits and units cost the same, no allocation of the same
    choices has less error in all.
    """

    def rule(costs: Costs, allowed: int) -> tuple[int, ...]:
        place_U = [0] * len(costs)
        left = allowed - sum(row[0] for row in costs.stored_UB)
        heap: list[tuple[float, int, int, int]] = []

        def offer(unit: int) -> None:
            now, stored, error = place_U[unit], costs.stored_UB[unit], error_UB[unit]
            steps = [
                ((error[now] - error[place]) / (stored[place] - stored[now]), place)
                for place in range(now + 1, len(stored))
                if stored[place] - stored[now] <= left and error[place] < error[now]
            ]
            if steps:
                gain, place = max(steps, key=lambda step: (step[0], -step[1]))
                heapq.heappush(heap, (-gain, unit, now, place))

        for unit in range(len(costs)):
            offer(unit)
        while heap:
            _, unit, now, place = heapq.heappop(heap)
            step = costs.stored_UB[unit][place] - costs.stored_UB[unit][now]
            if step <= left:  # otherwise the budget has shrunk since the offer; the unit offers what still fits
                place_U[unit] = place
                left -= step
            offer(unit)
        return tuple(costs.choices[place] for place in place_U)

    return rule


def protect(units: Sequence[int], rest: Callable[[Sequence[int]], Rule]) -> Rule:
    """Return the rule that gives ``units`` the widest choice, as super experts want it, and the others what is left.

    ``rest`` makes the rule of the other units from their numbers. Where all are protected, it is not asked.
    """
    kept = sorted(set(units))

    def rule(costs: Costs, allowed: int) -> tuple[int, ...]:
        if kept and not 0 <= kept[0] <= kept[-1] < len(costs):
            raise ValueError(f"protected units {kept} must lie within 0..{len(costs) - 1}; correct the ids.")
        others = [unit for unit in range(len(costs)) if unit not in kept]
        left = allowed - sum(costs.stored_UB[unit][-1] for unit in kept)
        if left < sum(costs.stored_UB[unit][0] for unit in others):
            raise ValueError(
                f"{len(kept)} protected experts at {costs.choices[-1]} bits leave the others less than "
                f"{costs.choices[0]} bits; protect fewer or raise the budget."
            )
        bits_U = [costs.choices[-1]] * len(costs)
        if others:
            spread = rest(others)(costs.subset(others), left)
            for unit, bits in zip(others, spread, strict=True):
                bits_U[unit] = bits
        return tuple(bits_U)

    return rule


# --- orders ----------------------------------------------------------------------------------------------------------


def most_first(score_U: Sequence[float]) -> list[int]:
    """Return the units by falling score: counts for frequency, outlier scores for the outlier scorer."""
    return sorted(range(len(score_U)), key=lambda unit: (-score_U[unit], unit))


def least_first(score_U: Sequence[float]) -> list[int]:
    """Return the units by rising score: with the cosine of each unit's block, the most important blocks come first."""
    return sorted(range(len(score_U)), key=lambda unit: (score_U[unit], unit))


def shuffled(count: int, seed: int) -> list[int]:
    """Return the units in an order that ``seed`` alone decides."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def layers_first(layer_U: Sequence[int], count: int, last: bool = False) -> list[int]:
    """Return the units of the first ``count`` layers, from the first on; of the last ones, from the last on."""
    return _units_of(sorted(set(layer_U), reverse=last), layer_U, count)


def layers_drawn(layer_U: Sequence[int], count: int, seed: int) -> list[int]:
    """Return the units of ``count`` layers that ``seed`` alone decides, layer by layer."""
    layers = sorted(set(layer_U))
    return _units_of([layers[place] for place in shuffled(len(layers), seed)], layer_U, count)


def _units_of(layers: Sequence[int], layer_U: Sequence[int], count: int) -> list[int]:
    if not 0 < count <= len(layers):
        raise ValueError(f"layers={count} must lie between 1 and the {len(layers)} layers there are.")
    rank = {layer: place for place, layer in enumerate(layers[:count])}
    return sorted((u for u, layer in enumerate(layer_U) if layer in rank), key=lambda u: (rank[layer_U[u]], u))


def kind_first(kind_U: Sequence[str], kind: str) -> list[int]:
    """Return the units of ``kind`` (``attention``, ``shared`` or ``routed``), then the others, each by number."""
    if kind not in kind_U:
        raise ValueError(f"no unit is of kind '{kind}'; choose another rule for this model.")
    return sorted(range(len(kind_U)), key=lambda unit: (kind_U[unit] != kind, unit))


def by_layer(bits_U: Sequence[int], layer_U: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return the bits layer by layer, by rising layer, the units of each in their order."""
    return tuple(
        tuple(bits for bits, own in zip(bits_U, layer_U, strict=True) if own == layer) for layer in sorted(set(layer_U))
    )
