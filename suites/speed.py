"""The suites that time one layer: throughput, latency, training and selftest. Imports torch only in workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..contracts import Case, Planned, Registry, Trial
from .base import Kind, SuiteConfig, expand
from .device import DEVICES


@dataclass(frozen=True)
class LayerSpeed:
    """One layer at a time, timed; the pass of the case decides between inference and training."""

    def cases(self, config: SuiteConfig, registry: Registry) -> Iterator[Planned]:
        """Yield the product (or the pairs) of the configuration's axes."""
        return expand(config, registry, Kind("timed", devices=DEVICES))

    def prepare(self, case: Case, registry: Registry) -> Trial:
        """Return the layer on its backend, with inputs and references."""
        if case.pass_ == "forward_backward":
            from .layer_training import TrainingTrial

            return TrainingTrial(case, registry)
        from .layer import LayerTrial

        return LayerTrial(case, registry)


def throughput(params: Any) -> LayerSpeed:
    """Make suite ``throughput``."""
    return LayerSpeed()


latency = training = selftest = throughput
