"""Two suites for what MoE++ (arXiv 2410.07348) says of its balance. Import torch only in workers.

``moepp_balance`` minimises the heterogeneous balance loss; ``moepp_time`` times the FFN experts of a layer whose load
is at that minimum, beside the layer without other experts, in one group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..contracts import Case, Choice, Planned, Registry, Trial
from .base import Kind, SuiteConfig, expand, plain_case


@dataclass(frozen=True)
class BalanceSuite:
    """The least heterogeneous balance loss, once per parameters of routing ``moepp``; no model is needed."""

    def cases(self, config: SuiteConfig, registry: Registry) -> Iterator[Planned]:
        """Yield one case per routing; only ``moepp`` has such a loss."""
        for routing in config.axes["routing"]:
            known = hasattr(registry.params("routing", routing), "tau")
            reason = None if known else f"routing '{routing}' has no balance tau; use axes.routing=moepp."
            yield Planned(self._case(config, routing), reason)

    def _case(self, config: SuiteConfig, routing: Choice) -> Case:
        workload = {"ffn_experts": config.suite_params.ffn_experts}
        return plain_case(config, protocol="once", routing=routing, dtype="float64", workload=workload)

    def prepare(self, case: Case, registry: Registry) -> Trial:
        """Return the minimisation."""
        from .moepp_trials import BalanceTrial

        return BalanceTrial(case, registry)


@dataclass(frozen=True)
class TimeSuite:
    """The FFN experts of a layer, timed, with as many assignments as balance gives them; the others do not run."""

    def cases(self, config: SuiteConfig, registry: Registry) -> Iterator[Planned]:
        """Yield the product of the axes; traffic gives hidden states alone, and backends see FFN experts alone."""
        gaussian = [registry.get("traffic", "gaussian").choose()]
        axes = {**config.axes, "traffic": gaussian, "pass": ["forward"], "boundary": ["topk"]}
        for planned in expand(replace(config, axes=axes), registry, Kind("timed", workload={"part": "ffn"})):
            execution = replace(planned.case.execution, folded=False)
            yield replace(planned, case=replace(planned.case, execution=execution))

    def prepare(self, case: Case, registry: Registry) -> Trial:
        """Return the layer's FFN part with balanced batches."""
        from .moepp_trials import FFNTimeTrial

        return FFNTimeTrial(case, registry)


def balance(params: Any) -> BalanceSuite:
    """Make suite ``moepp_balance``."""
    return BalanceSuite()


def time_share(params: Any) -> TimeSuite:
    """Make suite ``moepp_time``."""
    return TimeSuite()
