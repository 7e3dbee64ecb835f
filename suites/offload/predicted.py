"""The trial of a predicted row: what a run of the same case should take, from probes and the trace alone.

Imported by workers only.
"""

from __future__ import annotations

from typing import Literal

from ...contracts import Case, Check, Cost, Facts, Registry
from .figures import cache_figures
from .predicting import prediction_of
from .prediction import figures
from .prepared import prepared, slab_file


class PredictedTrial:
    """One step, which predicts; nothing is timed but the probes."""

    state: Literal["none"] = "none"
    steps = 1

    def __init__(self, case: Case, registry: Registry) -> None:
        self.params = registry.params("backend", case.backend)
        self.found = prepared(case, registry)
        self.file = slab_file(case, registry, self.found, self.params.low)
        self.case, self.registry = case, registry

    def begin_turn(self) -> None:
        """Nothing to make ready."""

    def run(self, step: int) -> None:
        """Predict."""
        self.prediction = prediction_of(self.case, self.registry, self.found, self.file, self.params)

    def verify(self, step: int, output: None) -> Check:
        """Nothing is computed that an oracle could check."""
        return Check(True)

    def cost(self, step: int) -> Cost:
        """Return nothing: a prediction has no time."""
        return Cost(0.0, 0.0)

    def facts(self) -> Facts:
        """Return what the simulator says of the cache, and what is predicted of time."""
        found = cache_figures(self.found.recording, self.prediction.simulated)
        return Facts((*found, *figures(self.prediction, ())))

    def close(self) -> None:
        """Nothing to free."""
