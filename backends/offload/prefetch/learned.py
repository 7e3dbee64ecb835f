"""Prefetchers that guess from what was used so far."""

from __future__ import annotations

from collections.abc import Sequence

from ..access import Key, Layout, Moment
from ..activation import ActivationMatrices


def following(layout: Layout, layer: int, count: int) -> list[int]:
    """Return the ``count`` layers after ``layer``, the first after the last, as the next step comes to them."""
    place, number = layout.layers.index(layer), len(layout.layers)
    return [layout.layers[(place + ahead) % number] for ahead in range(1, min(count, number) + 1)]


class Frequency:
    """Brings the experts that each of the next ``layers`` layers used most often so far; as many as were used now."""

    needs_future = False

    def __init__(self, layers: int = 1) -> None:
        if layers < 1:
            raise ValueError(f"layers={layers} must be at least 1.")
        self.layers = layers
        self._count: dict[int, dict[int, int]] = {}

    def propose(self, moment: Moment) -> Sequence[Key]:
        """Count this access, and return the most frequent of the following layers; ties go to the lower id."""
        access = moment.access
        counts = self._count.setdefault(access.layer, {})
        for expert in access.experts:
            counts[expert] = counts.get(expert, 0) + 1
        keys: list[Key] = []
        for layer in following(moment.layout, access.layer, self.layers):
            ranked = sorted(self._count.get(layer, {}).items(), key=lambda one: (-one[1], one[0]))
            keys += [(layer, expert) for expert, _ in ranked[: len(access.experts)]]
        return keys


class Nearest:
    """MoE-Infinity's prediction (arXiv 2401.14361): what the nearest stored activation matrix says of layers to come.

    An expert's priority is (its tokens in that matrix + 1e-8) (1 - d / (L + 1)), with d the layers between; those
    without tokens are left out. The authors bring everything down to the last layer; here the next ``layers`` layers,
    the first ones of the next step after the last one, with as many experts each as were used now: a cache that takes
    a proposal at its word must not be flooded.
    """

    needs_future = False

    def __init__(self, layers: int = 1, period: int = 16) -> None:
        if layers < 1:
            raise ValueError(f"layers={layers} must be at least 1.")
        self.layers = layers
        self._matrices = ActivationMatrices(period)

    def propose(self, moment: Moment) -> Sequence[Key]:
        """Add this access to the running matrix, and return the keys of the highest priorities."""
        self._matrices.see(moment)
        nearest_LE = self._matrices.nearest(moment)
        if nearest_LE is None:
            return []
        layers, found = moment.layout.layers, []
        for ahead, layer in enumerate(following(moment.layout, moment.access.layer, self.layers), 1):
            row_E = nearest_LE[layers.index(layer)]
            decay = 1 - ahead / (len(layers) + 1)
            ranked = sorted(
                (-(float(row_E[expert]) + 1e-8) * decay, (layer, int(expert))) for expert in row_E.nonzero()[0]
            )
            found += ranked[: len(moment.access.experts)]
        return [key for _, key in sorted(found)]
