"""Suite ``routing``: the router of one layer alone, timed whole and in parts. Imports torch only in workers.

A case is a routing and a phase. No expert runs, so a backend axis does not multiply the cases, and traffic must leave
the routing to the router.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..contracts import Case, Choice, Planned, Registry, Trial, plain
from ..moe.shapes import ModelShape
from .base import Kind, SuiteConfig, expand
from .routing_plugins import RouterAlone


class RoutingSuite:
    """The suite; phases, and what the figures compare with, are its parameters in the configuration."""

    def cases(self, config: SuiteConfig, registry: Registry) -> Iterator[Planned]:
        """Yield the product of the axes once per phase; boundary, pass and residency are fixed."""
        fixed: dict[str, list[Any]] = {
            "backend": [registry.get("backend", "reference").choose()],
            "pass": ["forward"],
            "boundary": ["topk"],
            "residency": ["warm"],
        }
        config = replace(config, axes={**config.axes, **fixed})
        for phase in config.suite_params.phases:
            workload = _workload(config.suite_params, phase, registry)
            for planned in expand(config, registry, Kind("timed", backend_free=True, workload=workload)):
                yield replace(planned, refusal=planned.refusal or refusal(planned.case, registry))

    def prepare(self, case: Case, registry: Registry) -> Trial:
        """Return the router on its inputs, with references."""
        from .routing_trials import make_trial

        return make_trial(case, registry)


def _workload(params: RouterAlone, phase: str, registry: Registry) -> dict[str, Any]:
    """Return the phase, and what decides its inputs and its figures."""
    workload: dict[str, Any] = {"phase": phase, "sequence": params.sequence}
    if phase == "route":
        other = registry.get("routing", params.other).choose()
        workload |= {"other": plain(other), "noise": params.noise, "capacity_factor": params.capacity_factor}
    return workload


def refusal(case: Case, registry: Registry) -> str | None:
    """Return why a case that could be planned is none for this suite, or None."""
    if registry.params("traffic", case.traffic).forced:
        return f"traffic '{case.traffic}' forces the routing, so no router runs; use axes.traffic=gaussian."
    shape = registry.params("structure", case.structure).reshape(registry.params("model", case.model).shape())
    if case.workload["phase"] in ("gate", "select") and not has_parts(case, shape, registry):
        return f"routing '{case.routing}' is no pipeline of scorer and selector; it has phases route and permute."
    if "other" in case.workload:
        other = Choice(**case.workload["other"])
        try:
            registry.params("routing", other).max_k(shape)
        except ValueError as error:
            return f"routing '{other}' cannot be compared with: {error}; set suite.other."
    return None


def has_parts(case: Case, shape: ModelShape, registry: Registry) -> bool:
    """Return whether the case's router is a Pipeline, as its parameters declare.

    ``pipeline`` of the parameter class says so (the parent makes no router); where it is not given, a router that can
    be handed over as logits is one.
    """
    params = registry.params("routing", case.routing)
    declared: bool | None = getattr(params, "pipeline", None)
    return params.selection(shape) is not None if declared is None else declared


def create(params: Any) -> RoutingSuite:
    """Make the suite; cases carry what of ``params`` they need."""
    return RoutingSuite()
