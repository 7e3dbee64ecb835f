"""The trial of suite ``accuracy``: one step is one window of text. Imported by workers only.

Shape letters: T tokens, H hidden, C columns of scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ...contracts import Case, Check, Cost, Facts, Item, Metric, Registry, Series
from ...moe.metrics import load_series, routing_metrics
from ...moe.routing import Routing
from ...moe.sparsity import density
from ..digest import sha256_of
from ..models import substream
from ..subject import prepare_subject
from ..text import evaluation_text
from .block import Call
from .bootstrap import BLOCK
from .changed import Changed, language_model
from .distance import columns_of, distance_metrics, error_series
from .language_model import dense_states
from .passage import take_passage
from .scores import COLUMNS, quality_metrics, score


class AccuracyTrial:
    """The whole model with the case's layers changed, on the case's backend, against the dense model."""

    state: Literal["none"] = "none"

    def __init__(self, case: Case, registry: Registry) -> None:
        self.case, self.window = case, int(case.workload["window"])
        self.subjects = {i: prepare_subject(replace(case, layers=(i,)), registry) for i in sorted(case.layers)}
        self.model, tokenizer = language_model(case, next(iter(self.subjects.values())).source)
        self.passage = take_passage(tokenizer, evaluation_text(), case.tokens, case.seed)
        first, *later = sorted(self.subjects)
        ids, weights = self.passage.ids, case.weights_sha256
        self.dense = dense_states(self.model, weights, ids[:-1], self.window, first, later)
        self.steps = case.tokens // self.window
        self.input_sha256 = sha256_of(ids)
        self.changed = Changed(case, registry, case.backend.name, self.subjects, self.model)
        self.scores: list[Tensor] = []
        self.routings: dict[int, list[Routing]] = {index: [] for index in self.subjects}
        self.distances: dict[int, list[Tensor]] = {index: [] for index in self.subjects}
        self.densities: dict[int, list[Metric]] = {}

    def begin_turn(self) -> None:
        """Nothing to make ready: every step writes anew."""

    def run(self, step: int) -> list[Call]:
        """Judge the window ``step``; return what the changed layers did."""
        part = slice(step * self.window, (step + 1) * self.window)
        final_TH = self.changed.forward(self.dense, part, self.passage.ids[:-1])
        ids, bytes_T = self.passage.ids[1:][part], self.passage.bytes_T[part]
        self.scores.append(score(self.model.lm_head, final_TH, self.dense.final[part], ids, bytes_T))
        for call in self.changed.calls:
            index = call.block.index
            self.routings[index].append(call.routing)
            self.distances[index].append(columns_of(call))
            if index not in self.densities:
                self.densities[index] = density(call.block.subject.layer.store, call.routing, call.x_TH)
        return list(self.changed.calls)

    def verify(self, step: int, output: list[Call]) -> Check:
        """Compare every changed layer with the float64 oracle on the inputs that it had; return the worst."""
        checks = [call.check() for call in output]
        failed = [check for check in checks if not check.ok]
        worst = max(failed or checks, key=lambda check: check.error or 0.0)
        return replace(worst, flips=sum(check.flips for check in checks))

    def cost(self, step: int) -> Cost:
        """Return nothing: quality has no time to compare work with."""
        return Cost(0.0, 0.0)

    def facts(self) -> Facts:
        """Return quality with intervals and by block of tokens, and what routing and sparsity did.

        Routing figures are over all windows, densities over the first; with several layers they are means over layers.
        """
        seed = substream(self.case.seed, "bootstrap")
        joined = {index: _joined(parts) for index, parts in self.routings.items()}
        per_layer = [[*routing_metrics(joined[index]), *self.densities[index]] for index in self.subjects]
        expert_bytes = sum(subject.layer.store.nbytes for subject in self.subjects.values())
        metrics = [
            *quality_metrics(torch.cat(self.scores), seed),
            *distance_metrics(self.distances, seed),
            *_means(per_layer),
            Metric("expert_bytes", float(expert_bytes), "byte"),
        ]
        series: list[Series] = [replace(load_series(joined[i], i), step=0) for i in joined]
        series.append(error_series(self.distances))
        return Facts(tuple(metrics), tuple(series), tuple(self._items()), self.changed.session.executed())

    def _items(self) -> list[Item]:
        """Return the mean scores of each BLOCK of tokens, so that two methods can be compared block by block."""
        return block_items(self.scores, f"text-{self.input_sha256[:12]}", ITEMS)

    def close(self) -> None:
        """Free the backend's session."""
        self.changed.close()


ITEMS = {"nll": "nll", "kl": "kl_to_dense", "agree": "top1_agreement"}
"""Columns of the scores that are kept, and the metrics' names."""


def block_items(windows: Sequence[Tensor], task: str, names: Mapping[str, str]) -> list[Item]:
    """Return items named by their first token: the means of columns over BLOCK tokens of one window, or its rest."""
    found, start = [], 0
    for scores_TC in windows:
        for part_TC in torch.split(scores_TC, BLOCK):
            means = {name: float(part_TC[:, COLUMNS.index(column)].mean()) for column, name in names.items()}
            found += [Item(task, str(start), name, value) for name, value in means.items()]
            start += len(part_TC)
    return found


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


def _means(per_layer: list[list[Metric]]) -> list[Metric]:
    """Return each metric's mean over layers; one that a layer lacks is None."""
    result = []
    for same in zip(*per_layer, strict=True):
        values = [metric.value for metric in same if metric.value is not None]
        mean = sum(values) / len(same) if len(values) == len(same) else None
        result.append(replace(same[0], value=mean, n=sum(metric.n or 0 for metric in same)))
    return result
