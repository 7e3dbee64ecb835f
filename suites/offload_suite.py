"""Suite ``offload``: whole models whose experts lie in a slow tier. Torch is imported in workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..contracts import Case, Evidence, Planned, Registry, Trial, plain
from .base import Kind, SuiteConfig, expand, select_layers

OFFLOAD = "offload"
"""The backend with a second tier; all others have every expert at hand."""

PREDICTED_SECONDS = 30.0


@dataclass(frozen=True)
class OffloadCases:
    """One case per model and backend, timed, and for each of backend ``offload`` one that predicts it."""

    def cases(self, config: SuiteConfig, registry: Registry) -> Iterator[Planned]:
        """Yield measured cases, then predicted ones."""
        params = config.suite_params
        predicted: list[Planned] = []
        for choice in config.axes["model"]:
            shape = registry.params("model", choice).shape()
            layers = select_layers(config.layers, shape, per_layer=False)
            own = replace(config, layers=layers, axes={**config.axes, "model": [choice], "residency": ["warm"]})
            kind = Kind("timed", per_layer=False, workload=_workload(params), foresees=True)
            for planned in expand(own, registry, kind):
                refusal = _refusal(planned.case, registry) or planned.refusal
                measured = replace(planned, refusal=refusal, method_bytes=planned.method_bytes * len(layers))
                yield measured
                if params.predicted and planned.case.backend.name == OFFLOAD and refusal is None:
                    case = replace(planned.case, protocol="once", evidence=Evidence.MODEL)
                    predicted.append(replace(measured, case=case, seconds=PREDICTED_SECONDS))
        yield from predicted

    def prepare(self, case: Case, registry: Registry) -> Trial:
        """Return the model with its experts where the case has them, or what predicts that."""
        if case.evidence == Evidence.MODEL:
            from .offload.predicted import PredictedTrial

            return PredictedTrial(case, registry)
        if case.backend.name == OFFLOAD:
            from .offload.trial import OffloadTrial

            return OffloadTrial(case, registry)
        from .offload.trial import ResidentTrial

        return ResidentTrial(case, registry)


def _workload(params: Any) -> dict[str, Any]:
    """Return what is asked of every case alike."""
    return {name: value for name, value in plain(params).items() if name != "predicted"}


def _refusal(case: Case, registry: Registry) -> str | None:
    """Return why a case that could be planned is none for this suite, or None."""
    if case.pass_ != "forward":
        return "a model that decodes has no backward pass; use axes.pass=forward."
    if case.workload["batching"] != "none" and not registry.params("traffic", case.traffic).forced:
        return (
            "batching needs the experts of waiting tokens; use a traffic that forces them, such as axes.traffic=zipf."
        )
    if case.execution.folded:
        return f"routing '{case.routing}' has experts without weights, which are not offloaded; use axes.routing=topk."
    if not getattr(registry.params("routing", case.routing), "causal", True):
        return f"routing '{case.routing}' looks at later tokens, which do not exist yet in decoding; use another."
    return None


def create(params: Any) -> OffloadCases:
    """Make suite ``offload``; cases carry what of ``params`` they need."""
    return OffloadCases()
