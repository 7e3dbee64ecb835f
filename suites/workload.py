"""The suites of workloads: a model is trained and a published method measured on it, once. Imports no torch.

A workload whose ``AXES`` name a model is of the models of that axis; the others train a small one of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..contracts import Case, Choice, Planned, Registry, Trial, plain
from .base import SuiteConfig, plain_case


@dataclass(frozen=True)
class WorkloadSuite:
    """The parameters of the suite are the workload: one case, or one for each model."""

    def cases(self, config: SuiteConfig, registry: Registry) -> Iterator[Planned]:
        """Yield the cases; models that bring no text are refused."""
        params = config.suite_params
        if "model" not in params.AXES:
            case = plain_case(config, protocol="once", pass_="forward_backward", workload=plain(params))
            yield Planned(case, seconds=params.SECONDS)
            return
        for model in config.axes["model"]:
            yield _of_model(config, params, model, registry)

    def prepare(self, case: Case, registry: Registry) -> Trial:
        """Return the training and the measurement."""
        from .workloads.trial import WorkloadTrial

        return WorkloadTrial(case, registry)


def _of_model(config: SuiteConfig, params: Any, model: Choice, registry: Registry) -> Planned:
    """Return the case of a model, or why it has none."""
    own = registry.params("model", model)
    refusal = own.missing()
    if refusal is None and not own.recorded:
        refusal = f"model '{model}' has no text to be trained on; use model=smollm2."
    case = plain_case(
        config,
        protocol="once",
        pass_="forward_backward",
        workload=plain(params),
        model=model,
        tokens=params.tokens,
        weights_sha256="" if refusal else own.weights_sha256(),
        base="" if refusal else own.base(),
    )
    return Planned(case, refusal, seconds=params.SECONDS)


def create(params: Any) -> WorkloadSuite:
    """Make the suite of a workload."""
    return WorkloadSuite()
