"""The trial of suite ``sparsity``: suite ``accuracy``'s, with what is left out in each layer and what finding it took.

Shape letters: T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ...contracts import SITES, Case, Facts, Metric, Registry, Series
from ...moe.channel_use import locality
from ...moe.recipe import Recipe
from ..subject import Subject, build_subject
from .block import Call
from .timed import TimedStage
from .trial import AccuracyTrial, means

CHUNKS = (1, 2, 4, 8, 16, 32)
"""Lengths of chunks whose common sparsity is told: a token, and what a batch or speculative decoding reads at once."""

FIGURES = (
    *("density_input", "density_gate", "density_hidden", "density_attention"),
    *("kept_flops", "kept_bytes", "kept_bytes_with_attention"),
)
"""What is told of each layer alone."""


class SparsityTrial(AccuracyTrial):
    """The whole model with the case's sparsity calibrated anew in its layers, whatever the cache keeps."""

    def __init__(self, case: Case, registry: Registry) -> None:
        self.elapsed = 0.0
        super().__init__(case, registry, {index: self._built(case, registry, index) for index in sorted(case.layers)})
        self.used: dict[int, list[Metric]] = {}

    def _built(self, case: Case, registry: Registry, index: int) -> Subject:
        case = replace(case, layers=(index,))
        recipe = Recipe.of(case, registry)
        stage = TimedStage(*recipe.sparsity)
        subject = build_subject(case, registry, replace(recipe, sparsity=stage), None)
        self.elapsed += stage.elapsed
        return subject

    def run(self, step: int) -> list[Call]:
        """Judge the window ``step``, and look at the first one for what its tokens leave out together."""
        calls = super().run(step)
        for call in calls:
            if call.block.index not in self.used:
                self.used[call.block.index] = list(together(call))
        return calls

    def facts(self) -> Facts:
        """Return what ``accuracy`` says, targets, TLS and CLS, and the time of calibration; and the figures by layer.

        Without sparsity there is no target, and nothing was calibrated.
        """
        found, spec = super().facts(), next(iter(self.subjects.values())).spec.sparsity
        target = None if spec is None else 1 - spec.level
        metrics = [
            Metric("target_density", target, "1"),
            Metric("calibration_elapsed", self.elapsed if spec is not None else None, "s", n=len(self.subjects)),
            *means(list(self.used.values())),
        ]
        return replace(found, metrics=(*found.metrics, *metrics), series=(*found.series, *self._series(metrics)))

    def _series(self, metrics: list[Metric]) -> Iterator[Series]:
        for name in FIGURES:
            own = [metric.value for layer in self.subjects for metric in self.densities[layer] if metric.name == name]
            known = [value for value in own if value is not None]
            if known and len(known) == len(own):
                yield Series(f"{name}_by_layer", tuple(known), "1")
        values = {metric.name: metric.value for metric in metrics}
        for site in SITES:
            by_length = [values.get(f"cls_{length}_{site}") for length in CHUNKS]
            known = [value for value in by_length if value is not None]
            if len(known) == len(by_length):
                yield Series(f"cls_by_chunk_{site}", tuple(known), "1")
                yield Series(f"cls_if_independent_{site}", tuple(known[0] ** length for length in CHUNKS), "1")


def together(call: Call) -> Iterator[Metric]:
    """Yield TLS, CLS of all ``CHUNKS`` and the union density of a call's tokens behind the dense prefix."""
    store, tokens = call.block.subject.layer.store, len(call.x_TH)
    later, x_TH = call.routing.part(call.prefix, tokens), call.x_TH[call.prefix :]
    seen = set()
    for length in CHUNKS:
        for metric in locality(store, later, x_TH, length):
            if metric.name not in seen:
                seen.add(metric.name)
                yield metric
