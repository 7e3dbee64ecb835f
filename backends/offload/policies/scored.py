"""Policies that weigh several signs of what an expert is worth."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..activation import ActivationMatrices
from ..importance import share_before
from .base import Key, Layout, Moment, Ranked


def proximity(layer: int, moment: Moment) -> float:
    """Return how soon ``layer`` comes: 1 for the next one, down to 1/L for the one that is being served now."""
    layers = moment.layout.layers
    ahead = (layers.index(layer) - layers.index(moment.access.layer) - 1) % len(layers)
    return 1 - ahead / len(layers)


class ActivationPriority(Ranked):
    """MoE-Infinity's priority (arXiv 2401.14361): frequency x layer proximity x score of the nearest trace.

    Frequency is the share of all uses so far. The score is the share of the layer's activations that the expert has in
    the stored activation matrix that is nearest to the running one, in the latter while none is stored. 1e-6 is added
    to both, as in the authors' code. [reconstructed] Their code has proximity for an encoder and a decoder; here the
    layers are a ring, since the first comes after the last at the next step.
    """

    def __init__(self, period: int = 16) -> None:
        self._matrices = ActivationMatrices(period)
        self._count: dict[Key, int] = {}
        self._total = 0
        self._rows: list[list[float]] = []
        self._near: dict[int, float] = {}

    def begin(self, moment: Moment) -> None:
        """Add the access to the running matrix, and find the nearest one."""
        self._matrices.see(moment)
        layers = moment.layout.layers
        nearest_LE = self._matrices.nearest(moment)
        matrix_LE = self._matrices.running_LE if nearest_LE is None else nearest_LE
        sums_L1 = matrix_LE.sum(axis=1, keepdims=True)
        self._rows = (matrix_LE / sums_L1.clip(min=1)).tolist()
        self._near = {layer: proximity(layer, moment) for layer in layers}
        self._place = {layer: place for place, layer in enumerate(layers)}

    def touch(self, key: Key, moment: Moment) -> None:
        """Count the use."""
        self._count[key] = self._count.get(key, 0) + 1
        self._total += 1

    def worth(self, key: Key, moment: Moment) -> tuple[float, ...]:
        """Return the product."""
        layer, expert = key
        frequency = self._count.get(key, 0) / max(self._total, 1) + 1e-6
        return (frequency * self._near[layer] * (self._rows[self._place[layer]][expert] + 1e-6),)


class MixedScore(Ranked):
    """HOBBIT's score (arXiv 2411.01433): a weighted sum of four signs, each in 0..1. [reconstructed]

    Recency (LRU): when the last use was, over now. Frequency (LFU): uses over accesses of the layer. High precision
    (LHU): uses in which it was important enough to be wanted in full precision (``importance``), over accesses of the
    layer: to bring such an expert again costs the most. Layer distance (FLD): how soon its layer comes.
    """

    def __init__(self, weights: tuple[float, float, float, float] = (1, 1, 1, 1), threshold: float = 0.6) -> None:
        if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
            raise ValueError(f"weights {weights} must be finite, not negative, and not all 0.")
        self.weights, self.threshold = weights, threshold
        self._last: dict[Key, int] = {}
        self._uses: dict[Key, int] = {}
        self._high: dict[Key, int] = {}
        self._served: dict[int, int] = {}
        self._near: dict[int, float] = {}

    def start(self, layout: Layout, capacity: int) -> Iterable[Key]:
        """Begin with an empty cache."""
        self._served = dict.fromkeys(layout.layers, 0)
        return ()

    def begin(self, moment: Moment) -> None:
        """Note who is used in full precision."""
        self._served[moment.access.layer] += 1
        self._near = {layer: proximity(layer, moment) for layer in moment.layout.layers}
        for expert, share in share_before(moment.access).items():
            if share <= self.threshold:
                key = (moment.access.layer, expert)
                self._high[key] = self._high.get(key, 0) + 1

    def touch(self, key: Key, moment: Moment) -> None:
        """Note the use."""
        self._uses[key] = self._uses.get(key, 0) + 1
        self._last[key] = moment.now

    def worth(self, key: Key, moment: Moment) -> tuple[float, ...]:
        """Return the weighted sum, then when the last use was."""
        recency, frequency, high, distance = self.weights
        last, served = self._last.get(key, -1) + 1, max(self._served[key[0]], 1)
        used = (frequency * self._uses.get(key, 0) + high * self._high.get(key, 0)) / served
        return (recency * last / (moment.now + 1) + used + distance * self._near[key[0]], last)
