"""How many requests for experts a cache answers, by formula: Che's approximation and a static set. Imports no torch.

Tokens choose independently of each other (the independent reference model); ``skew`` is the exponent of a Zipf law over
the experts of a layer, 0 for all alike. Real tokens stay with their experts for a while, so real hit rates of LRU are
higher; a recorded trace and the simulator say how much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def touch_probabilities(experts: int, k: int, skew: float = 0.0, batch: int = 1) -> list[float]:
    """Return for each expert of a layer the probability that a step of ``batch`` tokens uses it.

    A token uses ``k`` on average: expert i with 1 - exp(-theta p_i), p_i ~ (i + 1)^-skew; exactly k / E for skew 0, so
    that a batch uses E (1 - (1 - k/E)^B) of them.
    """
    if skew == 0.0:
        own = [k / experts] * experts
    else:
        raw = [(place + 1) ** -skew for place in range(experts)]
        own = _scaled(raw, k)
    return [1 - (1 - q) ** batch for q in own]


def _scaled(raw: Sequence[float], k: int) -> list[float]:
    """Return 1 - exp(-theta raw_i) with theta so that they sum to ``k``."""
    if k >= len(raw):
        return [1.0] * len(raw)
    low, high = 0.0, 1.0
    while sum(1 - math.exp(-high * one) for one in raw) < k:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        if sum(1 - math.exp(-middle * one) for one in raw) < k:
            low = middle
        else:
            high = middle
    return [1 - math.exp(-high * one) for one in raw]


def static_hit_rate(touched: Sequence[float], share: float) -> float:
    """Return the share of requests for the most popular ``share`` of the experts."""
    slots, found = share * len(touched), 0.0
    for q in sorted(touched, reverse=True):
        found += q * min(1.0, max(0.0, slots))
        slots -= 1
    return found / sum(touched)


def lru_hit_rate(touched: Sequence[float], layers: int, slots: float) -> float:
    """Return the hit rate of one LRU of ``slots`` for all layers, which are passed in order at every step."""
    import numpy as np

    from ...backends.offload.che import lru_hit_rate as by_popularity

    return by_popularity(np.asarray([touched]), slots, alike=layers)
