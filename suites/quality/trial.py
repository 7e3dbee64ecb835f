"""The trial of suite ``accuracy``: one step is one window of text. Imported by workers only.

Shape letters: T tokens, H hidden, C columns of scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...contracts import Case, Check, Facts, Metric, Registry, Series
from ...moe.metrics import load_series, routing_metrics
from ...moe.routing import Routing
from ..models import substream
from ..subject import Subject, gate_metrics
from .block import Call
from .distance import columns_of, distance_metrics, error_series
from .language_model import dense_states
from .scores import quality_metrics, score
from .stored import stored_metrics
from .windows import TextTrial


class AccuracyTrial(TextTrial):
    """The whole model with the case's layers changed, on the case's backend, against the dense model."""

    def __init__(self, case: Case, registry: Registry, subjects: Mapping[int, Subject] | None = None) -> None:
        super().__init__(case, registry, subjects)
        first, *later = sorted(self.subjects)
        # the first changed layer reads what it reads in the dense model, unless its own attention is changed
        changes = self.changed.attention.packed or self.changed.sparse_attention.layers
        later = [first, *later] if changes else later
        ids, weights = self.passage.ids, case.weights_sha256
        self.dense = dense_states(self.model, weights, ids[:-1], self.window, first, later)
        self.routings: dict[int, list[Routing]] = {index: [] for index in self.subjects}
        self.distances: dict[int, list[Tensor]] = {index: [] for index in self.subjects}
        self.densities: dict[int, list[Metric]] = {}

    def run(self, step: int) -> list[Call]:
        """Judge the window ``step``; return what the changed layers did."""
        judged = self.judged(step)
        final_TH = self.changed.forward(self.dense, self.part(step), self.passage.ids[:-1])[self.prompt :]
        ids, bytes_T = self.passage.ids[1:][judged], self.passage.bytes_T[judged]
        self.scores.append(score(self.model.lm_head, final_TH, self.dense.final[judged], ids, bytes_T))
        for call in self.changed.calls:
            index = call.block.index
            self.routings[index].append(call.routing)
            self.distances[index].append(columns_of(call))
            if index not in self.densities:
                self.densities[index] = call.sparsity()
        return list(self.changed.calls)

    def verify(self, step: int, output: list[Call]) -> Check:
        """Compare every changed layer with the float64 oracle on the inputs that it had; return the worst."""
        checks = [call.check() for call in output]
        failed = [check for check in checks if not check.ok]
        worst = max(failed or checks, key=lambda check: check.error or 0.0)
        return replace(worst, flips=sum(check.flips for check in checks))

    def facts(self) -> Facts:
        """Return quality with intervals and by block of tokens, and what routing and sparsity did.

        Routing figures are over all windows, densities over the first; with several layers they are means over layers.
        """
        seed = substream(self.case.seed, "bootstrap")
        joined = {index: _joined(parts) for index, parts in self.routings.items()}
        per_layer = [[*routing_metrics(joined[index]), *self.densities[index]] for index in self.subjects]
        metrics = [
            *quality_metrics(torch.cat(self.scores), seed),
            *distance_metrics(self.distances, seed),
            *means(per_layer),
            *stored_metrics(self.changed),
            *gate_metrics([subject.layer for subject in self.subjects.values()]),
        ]
        series: list[Series] = [replace(load_series(joined[i], i), step=0) for i in joined]
        series.append(error_series(self.distances))
        return Facts(tuple(metrics), tuple(series), tuple(self.items(ITEMS)), self.changed.session.executed())


ITEMS = {"nll": "nll", "kl": "kl_to_dense", "agree": "top1_agreement"}
"""Columns of the scores that are kept block by block, and the metrics' names."""


def _joined(parts: list[Routing]) -> Routing:
    """Return the Routings of consecutive windows as one."""
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + part.num_tokens)
    return Routing(
        torch.cat([part.token_N + start for part, start in zip(parts, starts, strict=False)]),
        torch.cat([part.expert_N for part in parts]),
        torch.cat([part.weight_N for part in parts]),
        (starts[-1], parts[0].num_experts),
    )


def means(per_layer: Sequence[Sequence[Metric]]) -> list[Metric]:
    """Return each metric's mean over layers, by its name; one that a layer lacks, or has as None, is None."""
    by_name: dict[str, list[Metric]] = {}
    for metric in (metric for metrics in per_layer for metric in metrics):
        by_name.setdefault(metric.name, []).append(metric)
    result = []
    for same in by_name.values():
        values = [metric.value for metric in same if metric.value is not None]
        mean = sum(values) / len(values) if len(values) == len(per_layer) else None
        result.append(replace(same[0], value=mean, n=sum(metric.n or 0 for metric in same)))
    return result
