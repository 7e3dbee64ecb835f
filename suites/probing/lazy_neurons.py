"""Probe ``lazy_neurons``: how few hidden activations of a token are not zero (arXiv 2210.06313).

With ReLU they are exact zeros. SwiGLU and GELU have nearly none: there the share above a part of the token's largest
activation says how lazy neurons are, and depends on that part. Neurons of experts that a token does not have are not
counted. Shape letters: N tokens of one expert, F expert width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from ...contracts import Case, Check, Facts, Metric, Registry, Series
from ...moe.probes.lazy import active_share, nonzero_share
from .base import Stage
from .pieces import pieces, recomposes
from .scene import Scene


class LazyNeurons:
    """Shares of the changed layers' hidden activations on the passage."""

    def __init__(self, case: Case, registry: Registry) -> None:
        self.scene, self.epsilon = Scene(case, registry), float(case.workload["epsilon"])
        self.input_sha256 = self.scene.input_sha256
        self.shares: dict[int, list[tuple[int, float, float]]] = {layer: [] for layer in sorted(case.layers)}

    @property
    def stages(self) -> Sequence[Stage]:
        """One window after another."""
        return [partial(self.window, ids_T) for ids_T in self.scene.windows()]

    def window(self, ids_T: Tensor) -> list[Check]:
        """Count in one window; put together the activations must give what the layers put out."""
        self.scene.forward(ids_T)
        checks = []
        for call in self.scene.calls:
            parts = list(pieces(call))
            checks.append(recomposes(call, parts))
            found = self.shares[call.block.index]
            for part in parts:
                size = part.hidden_NF.numel()
                found.append((size, nonzero_share(part.hidden_NF), active_share(part.hidden_NF, self.epsilon)))
        return checks

    def facts(self) -> Facts:
        """Return both shares, and by layer."""
        layers = {layer: _means(found) for layer, found in self.shares.items()}
        every = _means([one for found in self.shares.values() for one in found])
        count = sum(size for found in self.shares.values() for size, _, _ in found)
        names = ("nonzero_activations", "active_neurons")
        metrics = tuple(Metric(name, value, "1", n=count) for name, value in zip(names, every, strict=True))
        series = tuple(
            Series(f"{name}_by_layer", tuple(values[i] for values in layers.values()), "1")
            for i, name in enumerate(names)
        )
        return Facts(metrics, series, (), self.scene.executed())

    def close(self) -> None:
        """Free the backend's session."""
        self.scene.close()


def _means(found: Sequence[tuple[int, float, float]]) -> tuple[float, float]:
    """Return both shares of all counted activations."""
    total = sum(size for size, _, _ in found) or 1
    return sum(n * a for n, a, _ in found) / total, sum(n * b for n, _, b in found) / total
