"""The trial of every workload: step 0 trains, step 1 measures and checks."""

from __future__ import annotations

import math
from typing import Any, Literal

from ...contracts import Case, Check, Cost, Facts, Registry, load_attribute
from ..quality.language_model import language_model
from .base import Report, Workload


def _language_model(case: Case, registry: Registry) -> tuple[Any, Any]:
    """Return the case's model and its tokenizer."""
    return language_model(case, registry.get("model", case.model.name).create(case.model.params))


class WorkloadTrial:
    """Runs a workload once; what fails its check has no figures."""

    state: Literal["none"] = "none"
    steps = 2

    def __init__(self, case: Case, registry: Registry) -> None:
        params = registry.get("suite", case.suite).params_from(case.workload)
        made = load_attribute(params.WORKLOAD)
        given = _language_model(case, registry) if "model" in params.AXES else ()
        self.workload: Workload = made(params, case.seed, *given)
        self.report: Report | None = None

    def begin_turn(self) -> None:
        """Nothing to make ready."""

    def run(self, step: int) -> float | Report:
        """Train (the last loss is returned), then measure."""
        if step == 0:
            return self.workload.train()
        self.report = self.workload.measure()
        return self.report

    def verify(self, step: int, output: float | Report) -> Check:
        """Refuse a training that diverged, a report whose identities do not hold, and figures that are no numbers."""
        if not isinstance(output, Report):
            reason = "" if math.isfinite(output) else f"the training ended at loss {output}; take another seed"
            return Check(not reason, reason=reason)
        broken = [m.name for m in output.metrics if m.value is not None and not math.isfinite(m.value)]
        if output.check.ok and broken:
            return Check(False, reason=f"{', '.join(broken)}: no finite number")
        return output.check

    def cost(self, step: int) -> Cost:
        """Return nothing: this is no measurement of time."""
        return Cost(0.0, 0.0)

    def facts(self) -> Facts:
        """Return the figures, none where the check failed."""
        if self.report is None or not self.verify(1, self.report).ok:
            return Facts()
        return Facts(self.report.metrics, self.report.series)

    def close(self) -> None:
        """Let go of models and data."""
        del self.workload
