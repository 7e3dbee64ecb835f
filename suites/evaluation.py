"""Suite ``lm_eval``: what a language model with some FFNs changed answers to tasks of lm-eval. Torch is in workers.

Like a case of ``accuracy`` one of this suite is a method, judged once, on ``eager``. Without layers (`model.layers=[]`)
it is the model as it is.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..contracts import Case, Planned, Registry, Trial
from .accuracy import AccuracySuite
from .base import SuiteConfig

CHANGES = ("quantization", "sparsity")
"""Axes that say nothing of a model none of whose layers change."""


@dataclass(frozen=True)
class LmEvalSuite(AccuracySuite):
    """The suite; which tasks, and how many items of each, are its parameters in the configuration."""

    def cases(self, config: SuiteConfig, registry: Registry) -> Iterator[Planned]:
        """Yield one case per method and dtype; all are refused where lm-eval is not installed."""
        for planned in super().cases(config, registry):
            yield replace(planned, refusal=planned.refusal or _refusal(planned.case))

    def workload(self, params: Any) -> dict[str, Any]:
        """Return the tasks and how they are asked."""
        return {"tasks": list(params.tasks), "items": params.items, "window": params.window, "batch": params.batch}

    def prepare(self, case: Case, registry: Registry) -> Trial:
        """Return the model with its layers changed and the requests of the tasks."""
        from .tasks.trial import TaskTrial

        return TaskTrial(case, registry)


def _refusal(case: Case) -> str | None:
    if importlib.util.find_spec("lm_eval") is None:
        return "suite 'lm_eval' needs lm-eval; run pip install 'moebench[lm-eval]'."
    changed = next((axis for axis in CHANGES if getattr(case, axis).name != "none"), None)
    if not case.layers and changed is not None:
        return f"model.layers=[] changes no layer, and so no {changed}; name layers, or leave {changed} out."
    return None


def create(params: Any) -> LmEvalSuite:
    """Make the suite; cases carry what of ``params`` they need."""
    return LmEvalSuite()
