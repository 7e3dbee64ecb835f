"""Suite ``pretraining``: a model is trained once, with progress, checkpoints and curves. Torch is imported in workers.

A killed run goes on from the newest checkpoint; what is trained lies in the cache and not in the store.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..contracts import Case, Choice, Evidence, Planned, Registry, Trial, plain
from .base import SuiteConfig, plain_case, threads_refusal
from .estimate import model_seconds

CUBLAS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""Without this in the environment, cuBLAS may answer differently each time."""


@dataclass(frozen=True)
class PretrainingSuite:
    """One case for each model and number of threads: the bits of the result depend on both."""

    def cases(self, config: SuiteConfig, registry: Registry) -> Iterator[Planned]:
        """Yield a case for each model; those that are not trained here are refused."""
        for model in config.axes["model"]:
            params = registry.params("model", model)
            for threads in config.axes["threads"]:
                reason = None if hasattr(params, "trainer") else f"model '{model}' is not trained here; use tinymoe."
                case = self._case(config, model, params, threads)
                yield Planned(case, reason or threads_refusal(threads), seconds=_seconds(params))

    def _case(self, config: SuiteConfig, model: Choice, params: Any, threads: int) -> Case:
        trained = hasattr(params, "trainer")
        on_gpu = config.device != "cpu"
        return plain_case(
            config,
            protocol="once",
            model=model,
            pass_="forward_backward",
            tokens=params.step_tokens if trained else 1,
            threads=threads,
            evidence=Evidence.MEASURED_GPU if on_gpu else Evidence.MEASURED_CPU,
            seed=params.seed if trained else config.seed,
            weights_sha256=f"training:{params.identity()}" if trained else "",
            workload=plain(params.sizes) if trained else {},
            environment=CUBLAS if on_gpu else {},
        )

    def prepare(self, case: Case, registry: Registry) -> Trial:
        """Return the training, as far as an earlier one came."""
        from .training.trial import PretrainingTrial

        return PretrainingTrial(case, registry)


def _seconds(params: Any) -> float:
    """Return about how long a training takes: forward, and twice that backward."""
    if not hasattr(params, "trainer"):
        return 0.0
    return model_seconds(params.shape(), params.step_tokens * params.sizes.training.steps, passes=3)


def create(params: Any) -> PretrainingSuite:
    """Make suite ``pretraining``."""
    return PretrainingSuite()
