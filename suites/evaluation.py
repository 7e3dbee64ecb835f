"""Suite ``lm_eval``: what a language model with some FFNs changed answers to tasks of lm-eval. Torch is in workers.

Like a case of ``accuracy`` one of this suite is a method, judged once, on ``eager``. Without layers (`model.layers=[]`)
it is the model as it is.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..contracts import Case, Planned, Registry, Trial
from ..moe.shapes import ModelShape
from .accuracy import AccuracySuite
from .base import SuiteConfig

TOKENS = 24
"""Tokens that an item makes the model read, of our own tasks: both options where they have more than one token."""

UNKNOWN_ITEMS = 1000
"""Items of a task that is taken whole, for the estimate."""

FLOPS = 2e10
"""What a core does a second, for the estimate."""

CHANGES = ("quantization", "sparsity")
"""Axes that say nothing of a model none of whose layers change."""


@dataclass(frozen=True)
class LmEvalSuite(AccuracySuite):
    """The suite; which tasks, and how many items of each, are its parameters in the configuration."""

    without_layers: ClassVar[bool] = True

    def cases(self, config: SuiteConfig, registry: Registry) -> Iterator[Planned]:
        """Yield one case per method and dtype; all are refused where lm-eval is not installed."""
        for planned in super().cases(config, registry):
            case = planned.case
            seconds = _seconds(registry.params("model", case.model).shape(), case)
            yield replace(planned, refusal=planned.refusal or _refusal(case), seconds=seconds)

    def workload(self, params: Any) -> dict[str, Any]:
        """Return the tasks and how they are asked."""
        return {"tasks": list(params.tasks), "items": params.items, "window": params.window, "batch": params.batch}

    def prepare(self, case: Case, registry: Registry) -> Trial:
        """Return the model with its layers changed and the requests of the tasks."""
        from .tasks.trial import TaskTrial

        return TaskTrial(case, registry)


def _seconds(shape: ModelShape, case: Case) -> float:
    """Return about how long a case takes: two operations for each weight of a token's layers, the head left out."""
    active = shape.width * (min(shape.top_k, shape.experts) or 1) + shape.shared_width
    weights = shape.layers * shape.hidden * (4 * shape.hidden + 3 * active)
    tokens = len(case.workload["tasks"]) * (case.workload["items"] or UNKNOWN_ITEMS) * TOKENS
    return 20.0 + tokens * 2 * weights / FLOPS


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
