"""Suite ``probe``: what can be read off a model, one case per probe. Torch is imported in workers.

A case is a method, as in suite ``accuracy``: judged once, on ``eager``, whatever the axes say of backends or tokens.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..contracts import Case, Planned, Registry, Trial, plain
from .accuracy import AccuracySuite
from .base import SuiteConfig, plain_case, sparsity_refusal
from .estimate import model_seconds
from .evaluation import CHANGES
from .probe_plugins import OF_EXPERTS, WITHOUT_MODEL

PASSES = {"voids": 12.0, "sae": 4.0}
"""Forward passes over a probe's text and calibration text, beside the draws; two where none is named."""


@dataclass(frozen=True)
class ProbeSuite(AccuracySuite):
    """Suite ``probe``; which probes, and how each looks, is said by its parameters."""

    without_layers: ClassVar[bool] = True

    def cases(self, config: SuiteConfig, registry: Registry) -> Iterator[Planned]:
        """Yield one case per probe, mode, method and dtype."""
        for one in _single(config.suite_params):
            (probe,) = one.probe
            default = "moe" if probe in OF_EXPERTS else ()
            alone = replace(config, suite_params=one, layers=default if config.layers is None else config.layers)
            if probe in WITHOUT_MODEL:
                case = plain_case(alone, protocol="once", workload=self.workload(one), pass_="forward_backward")
                yield Planned(case, _no_digits(), seconds=60.0)
                continue
            for planned in super().cases(alone, registry):
                seconds = model_seconds(
                    registry.params("model", planned.case.model).shape(), one.tokens, PASSES.get(probe, 2.0) + one.draws
                )
                yield replace(planned, refusal=planned.refusal or _refusal(planned.case, registry), seconds=seconds)

    def workload(self, params: Any) -> dict[str, Any]:
        """Return the probe and the parameters that it reads."""
        (probe,) = params.probe
        read: dict[str, Any] = plain({"probe": probe, **params.read_by(probe)})
        if "mode" in read:
            (read["mode"],) = params.mode
        return read

    def prepare(self, case: Case, registry: Registry) -> Trial:
        """Return the probe on its model and text."""
        from .probing.trial import ProbeTrial

        return ProbeTrial(case, registry)


def _single(params: Any) -> Iterator[Any]:
    """Yield the parameters of each probe alone, of ``voids`` in each mode alone."""
    for probe in params.probe:
        for mode in params.mode if probe == "voids" else params.mode[:1]:
            yield replace(params, probe=(probe,), mode=(mode,))


def _refusal(case: Case, registry: Registry) -> str | None:
    probe = case.workload["probe"]
    if probe in OF_EXPERTS and not case.layers:
        return f"probe '{probe}' looks into experts and model.layers=[] names no layer; give model.layers=all."
    if case.workload.get("kv") == "missing" and case.workload["mode"] != "skip":
        return "keys are missing only where layers are skipped; use suite.mode=[skip] with suite.kv=missing."
    changed = [axis for axis in CHANGES if not case.layers and getattr(case, axis).name != "none"]
    if changed:
        return f"axes.{changed[0]} changes no layer where model.layers=[] names none; give model.layers=all."
    return sparsity_refusal(case, registry, whole_model=False) or _prefix_refusal(case)


def _prefix_refusal(case: Case) -> str | None:
    if case.workload["probe"] == "voids" and case.sparsity.params.get("dense_prefix"):
        return (
            f"probe 'voids' generates text of no known length, of which a dense prefix is no share; use "
            f"params.sparsity.{case.sparsity.name}.dense_prefix=0."
        )
    return None


def _no_digits() -> str | None:
    if importlib.util.find_spec("sklearn") is None:
        return "probe 'lazy_training' reads the digits of scikit-learn; run pip install 'moebench[workloads]'."
    return None


def create(params: Any) -> ProbeSuite:
    """Make suite ``probe``; cases carry what of ``params`` they need."""
    return ProbeSuite()
