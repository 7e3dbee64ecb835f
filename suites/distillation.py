"""Suite ``distillation``: a trained model compressed and distilled, for each recipe. Torch is imported in workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..contracts import Case, Choice, Planned, Registry, Trial
from .base import SuiteConfig, plain_case, threads_refusal
from .distillation_plugins import SLIMMING
from .estimate import model_seconds

PASSES = 5
"""Of a step's tokens: forward and twice that backward, the teacher's forward, and some for what is held out."""


@dataclass(frozen=True)
class DistillationSuite:
    """One case for each model, recipe and number of threads: the bits of the result depend on all of them."""

    def cases(self, config: SuiteConfig, registry: Registry) -> Iterator[Planned]:
        """Yield a case for each recipe; models without a trainer are refused, and those that a recipe is not for."""
        for model in config.axes["model"]:
            params = registry.params("model", model)
            for recipe in config.suite_params.recipe:
                for threads in config.axes["threads"]:
                    reason = _refusal(model, params, recipe) or threads_refusal(threads)
                    yield self._planned(config, model, params, recipe, threads, reason)

    def _planned(
        self, config: SuiteConfig, model: Choice, params: Any, recipe: str, threads: int, refusal: str | None
    ) -> Planned:
        own = config.suite_params
        if refusal is not None:
            return Planned(plain_case(config, protocol="once", model=model, workload={"recipe": recipe}), refusal)
        case = plain_case(
            config,
            protocol="once",
            model=model,
            pass_="forward_backward",
            tokens=params.step_tokens,
            threads=threads,
            weights_sha256=params.weights_sha256(),
            workload={"recipe": recipe, "steps": own.steps, "lr": own.lr, "windows": own.windows},
        )
        return Planned(case, seconds=model_seconds(params.shape(), params.step_tokens * own.steps, PASSES))

    def prepare(self, case: Case, registry: Registry) -> Trial:
        """Return the teacher, and the stages to come."""
        from .training.distillation_trial import DistillationTrial

        return DistillationTrial(case, registry)


def _refusal(model: Choice, params: Any, recipe: str) -> str | None:
    """Return why a model cannot be distilled by a recipe, or None."""
    if not hasattr(params, "trainer"):
        return f"model '{model}' brings no text to be distilled on; use tinymoe or tinydense."
    missing: str | None = params.missing()
    if missing:
        return missing
    if (recipe in SLIMMING) == (params.shape().experts > 0):
        return None
    wanted = "has experts, such as tinymoe" if recipe in SLIMMING else "is dense, such as tinydense"
    return f"recipe '{recipe}' is for a model that {wanted}; choose that, or another recipe."


def create(params: Any) -> DistillationSuite:
    """Make suite ``distillation``; cases carry what of ``params`` they need."""
    return DistillationSuite()
