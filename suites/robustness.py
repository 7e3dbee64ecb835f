"""Suite ``robustness``: how small MoE models trained here hold up beyond clean data. Imports torch in workers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..contracts import Case, Planned, Registry, Trial
from .base import SuiteConfig, plain_case
from .robustness_plugins import ALL, METHODS


@dataclass(frozen=True)
class RobustnessSuite:
    """One case per task and way of training; no model and no axis has a say in it."""

    def cases(self, config: SuiteConfig, registry: Registry) -> Iterator[Planned]:
        """Yield the cases that are asked for; all are refused where the data set's package is absent."""
        params = config.suite_params
        absent = importlib.util.find_spec("sklearn") is None
        refusal = "suite 'robustness' needs scikit-learn; run pip install 'moebench[workloads]'." if absent else None
        for task in params.tasks:
            for method in METHODS[task]:
                if params.method in (ALL, method):
                    workload = {"task": task, "method": method, "steps": params.steps, **_knobs(task, params)}
                    yield Planned(plain_case(config, protocol="once", workload=workload), refusal=refusal)

    def prepare(self, case: Case, registry: Registry) -> Trial:
        """Return the training and the judgement of one method."""
        from .robust.trial import RobustTrial

        return RobustTrial(case)


def _knobs(task: str, params: Any) -> dict[str, float]:
    """Return the parameters that this task reads, so that others do not change its key."""
    return {
        "images": {"epsilon": params.epsilon},
        "neurons": {"label_noise": params.label_noise},
        "answers": {},
    }[task]


def create(params: Any) -> RobustnessSuite:
    """Make suite ``robustness``."""
    return RobustnessSuite()
