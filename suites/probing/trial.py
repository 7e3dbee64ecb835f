"""The trial of suite ``probe``: a step is a stage of the probe, and what it checked is its oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ...contracts import Case, Check, Cost, Facts, Registry, load_attribute
from .base import Probe

PROBES = {
    "super_experts": "super_experts:SuperExperts",
    "voids": "voids:Voids",
    "lazy_neurons": "lazy_neurons:LazyNeurons",
    "specialisation": "specialisation:Specialisation",
    "activation_flow": "activation_flow:ActivationFlow",
    "sae": "dictionary:AttentionDictionary",
    "lazy_training": "lazy_training:LazyTraining",
}
"""Where each probe is, in this package."""


class ProbeTrial:
    """Runs the stages of one probe."""

    state: Literal["none"] = "none"

    def __init__(self, case: Case, registry: Registry) -> None:
        place = f"{__package__}.{PROBES[case.workload['probe']]}"
        self.probe: Probe = load_attribute(place)(case, registry)
        self.stages = list(self.probe.stages)
        self.steps = len(self.stages)
        self.input_sha256 = self.probe.input_sha256
        self.done = 0

    def begin_turn(self) -> None:
        """Nothing to make ready."""

    def run(self, step: int) -> Sequence[Check]:
        """Run a stage; return what it checked."""
        checks: Sequence[Check] = self.stages[step]()
        self.done += 1
        return checks

    def verify(self, step: int, output: Sequence[Check]) -> Check:
        """Return the worst check of a stage, the first that failed where one did."""
        failed = [check for check in output if not check.ok]
        return max(failed or output, key=lambda check: check.error or 0.0, default=Check(True))

    def cost(self, step: int) -> Cost:
        """Return nothing: a probe has no time to compare work with."""
        return Cost(0.0, 0.0)

    def facts(self) -> Facts:
        """Return what the probe found; nothing before all stages have run."""
        return self.probe.facts() if self.done == self.steps else Facts()

    def close(self) -> None:
        """Free what the probe holds."""
        self.probe.close()
