"""The suites of workloads: a small model is trained and a published method measured on it, once. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..contracts import Case, Planned, Registry, Trial, plain
from .base import SuiteConfig, plain_case


@dataclass(frozen=True)
class WorkloadSuite:
    """One case: the parameters of the suite are the workload."""

    def cases(self, config: SuiteConfig, registry: Registry) -> Iterator[Planned]:
        """Yield the case."""
        params = config.suite_params
        case = plain_case(config, protocol="once", pass_="forward_backward", workload=plain(params))
        yield Planned(case, seconds=params.SECONDS)

    def prepare(self, case: Case, registry: Registry) -> Trial:
        """Return the training and the measurement."""
        from .workloads.trial import WorkloadTrial

        return WorkloadTrial(case, registry)


def create(params: Any) -> WorkloadSuite:
    """Make the suite of a workload."""
    return WorkloadSuite()
