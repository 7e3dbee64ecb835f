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
from .accuracy import AccuracySuite
from .base import SuiteConfig
from .estimate import model_seconds

TOKENS = 24
"""Tokens that an item makes the model read, of our own tasks: both options where they have more than one token."""

ITEMS = 300
"""Items of a task of ours."""

FOREIGN_TOKENS, FOREIGN_ITEMS = 400, 10_000
"""The same of a task of lm-eval's own, which is not looked into before it runs: more than most have."""

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
            seconds = model_seconds(registry.params("model", case.model).shape(), _tokens(case))
            yield replace(planned, refusal=planned.refusal or _refusal(case), seconds=seconds)

    def workload(self, params: Any) -> dict[str, Any]:
        """Return the tasks and how they are asked."""
        return {"tasks": list(params.tasks), "items": params.items, "window": params.window, "batch": params.batch}

    def prepare(self, case: Case, registry: Registry) -> Trial:
        """Return the model with its layers changed and the requests of the tasks."""
        from .tasks.trial import TaskTrial

        return TaskTrial(case, registry)


def _tokens(case: Case) -> float:
    """Return about how many tokens the tasks of a case make a model read."""
    total = 0
    for task in case.workload["tasks"]:
        items, tokens = (ITEMS, TOKENS) if task.startswith("moebench_") else (FOREIGN_ITEMS, FOREIGN_TOKENS)
        total += min(items, case.workload["items"] or items) * tokens
    return total


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
