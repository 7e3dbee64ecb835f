"""Suites of a language model with some FFNs changed: ``accuracy`` and ``backend_kl``. Torch is imported in workers.

A case of ``accuracy`` is a method: whatever the axes say of backends, traffic or tokens, it is judged once, on
``eager``, on text of the suite's own length. ``backend_kl`` asks of each backend whether it runs a method as
``reference`` does. The layer is the one that layer suites take, so that quality and speed meet on ``method_key``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..contracts import Case, Planned, Registry, Trial
from .base import Kind, SuiteConfig, expand, select_layers
from .estimate import model_seconds

PASSES = 4
"""Of the text through the model: as it was, changed, and the float64 oracle of the changed layers."""


@dataclass(frozen=True)
class AccuracySuite:
    """Suite ``accuracy``; how much text is judged, in windows of what length, is said by its parameters."""

    without_layers: ClassVar[bool] = False
    """Whether a model none of whose layers change may be judged."""

    def cases(self, config: SuiteConfig, registry: Registry) -> Iterator[Planned]:
        """Yield one case per method and dtype; models without text are refused."""
        for choice in config.axes["model"]:
            model = registry.params("model", choice)
            layers = select_layers(config.layers, model.shape(), per_layer=config.layers is None)
            axes = {**config.axes, **self._fixed(config, registry, model.recorded), "model": [choice]}
            kind = Kind("once", per_layer=False, workload=self.workload(config.suite_params))
            for planned in expand(replace(config, axes=axes, layers=layers), registry, kind):
                refusal = planned.refusal or self._layerless(planned.case) or self.refusal(planned.case, registry)
                seconds = model_seconds(model.shape(), planned.case.tokens, PASSES)
                yield replace(planned, refusal=refusal, seconds=seconds)

    def refusal(self, case: Case, registry: Registry) -> str | None:
        """Return why a case that could be planned is none for this suite, or None."""
        return text_refusal(case, registry)

    def _layerless(self, case: Case) -> str | None:
        if case.layers or self.without_layers:
            return None
        return "model.layers=[] changes no layer; name some, or ask the model as it is by suite=lm_eval."

    def _fixed(self, config: SuiteConfig, registry: Registry, recorded: bool) -> dict[str, Any]:
        """Return the axes that do not multiply quality."""
        traffic = "recorded" if recorded else "gaussian"
        return {
            **self.backends(config, registry),
            "traffic": [registry.get("traffic", traffic).choose()],
            "tokens": [config.suite_params.tokens],
            "pass": ["forward"],
            "boundary": ["topk"],
            "threads": list(config.axes["threads"])[:1],
            "residency": ["warm"],
        }

    def workload(self, params: Any) -> dict[str, Any]:
        """Return what is asked of every method alike."""
        return {"window": params.window, **({"prompt": params.prompt} if params.prompt else {})}

    def backends(self, config: SuiteConfig, registry: Registry) -> dict[str, Any]:
        """Return the one backend on which quality is judged."""
        return {"backend": [registry.get("backend", "eager").choose()]}

    def prepare(self, case: Case, registry: Registry) -> Trial:
        """Return the model with its layers changed, and the dense model's states on the text."""
        from .quality.trial import AccuracyTrial

        return AccuracyTrial(case, registry)


@dataclass(frozen=True)
class BackendSuite(AccuracySuite):
    """Suite ``backend_kl``: one case per method, dtype and backend."""

    def backends(self, config: SuiteConfig, registry: Registry) -> dict[str, Any]:
        """Return nothing: the backends are those that the axes say."""
        return {}

    def prepare(self, case: Case, registry: Registry) -> Trial:
        """Return the model with its layers on the case's backend, and on ``reference``."""
        from .quality.backends import BackendTrial

        return BackendTrial(case, registry)


def text_refusal(case: Case, registry: Registry) -> str | None:
    """Return why this method cannot be judged on text, or None."""
    if not registry.params("model", case.model).recorded:
        return f"model '{case.model}' has no text to be judged on; use model=smollm2."
    params = registry.params("routing", case.routing)
    prompted = bool(case.workload.get("prompt")) and getattr(params, "causal_after_prompt", False)
    if not getattr(params, "causal", True) and not prompted:
        remedy = "give suite.prompt=N, or use" if getattr(params, "causal_after_prompt", False) else "use"
        return (
            f"routing '{case.routing}' looks at later tokens, which a language model must not; {remedy} suite=routing."
        )
    absent = getattr(params, "beyond_text", None)
    if absent is not None and not (prompted and absent == "attn"):
        return (
            f"routing '{case.routing}' needs the Context's '{absent}', which a text does not give; use suite=routing."
        )
    return None


def create(params: Any) -> AccuracySuite:
    """Make suite ``accuracy``; cases carry what of ``params`` they need."""
    return AccuracySuite()


def backend_kl(params: Any) -> BackendSuite:
    """Make suite ``backend_kl``; cases carry what of ``params`` they need."""
    return BackendSuite()
