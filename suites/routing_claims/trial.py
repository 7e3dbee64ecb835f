"""The trial of suite ``routing_claims``."""

from __future__ import annotations

import importlib
import math
from typing import Literal

from ...contracts import Case, Check, Cost, Facts, Metric, Registry
from ..claims_plugins import FAMILY_OF
from .base import Claim, Outcome, Scene


def claim_of(name: str) -> Claim:
    """Return the function that computes a claim."""
    module = importlib.import_module(f"{__package__}.{FAMILY_OF[name]}")
    claim: Claim = module.CLAIMS[name]
    return claim


class ClaimTrial:
    """Computes one claim once."""

    state: Literal["none"] = "none"
    steps = 1

    def __init__(self, case: Case, registry: Registry) -> None:
        self.claim = claim_of(case.workload["claim"])
        self.scene = Scene(registry, case.seed)
        self.outcome: Outcome | None = None

    def begin_turn(self) -> None:
        """Nothing to make ready."""

    def run(self, step: int) -> Outcome:
        """Return a and b."""
        self.outcome = self.claim(self.scene)
        return self.outcome

    def verify(self, step: int, output: Outcome) -> Check:
        """Accept finite numbers that were come by soundly; whether the paper's rule holds is judged elsewhere."""
        if not all(map(math.isfinite, (output.a, output.b))):
            return Check(False, reason=f"a={output.a} and b={output.b} are not both finite")
        return Check(output.sound, reason="" if output.sound else output.reason)

    def cost(self, step: int) -> Cost:
        """Return nothing: this is no measurement of time."""
        return Cost(0.0, 0.0)

    def facts(self) -> Facts:
        """Return a and b, and the figures beside them; nothing before the claim has run."""
        if self.outcome is None:
            return Facts()
        pair = (Metric("claim_a", self.outcome.a), Metric("claim_b", self.outcome.b))
        return Facts((*pair, *(Metric(name, value) for name, value in self.outcome.figures.items())))

    def close(self) -> None:
        """Nothing to free."""
