"""The trial of suite ``accuracy``: one step is one window of text. Imported by workers only.

Shape letters: T tokens, H hidden, C columns of scores.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ...contracts import Case, Check, Cost, Facts, Item, Metric, MoebenchError, Registry, Series
from ...moe.fold import Folded, fold_store
from ...moe.metrics import load_series, routing_metrics
from ...moe.routing import Routing
from ...moe.sparsity import density
from ..digest import sha256_of
from ..models import substream
from ..subject import Subject, prepare_subject
from ..text import evaluation_text
from .block import Call, MoEBlock
from .language_model import dense_states, exchanged, forward_from
from .passage import take_passage
from .scores import COLUMNS, quality_metrics, score

_MODELS: dict[str, tuple[Any, Any]] = {}


class AccuracyTrial:
    """The whole model with the case's layers changed, on the case's backend, against the dense model."""

    state: Literal["none"] = "none"

    def __init__(self, case: Case, registry: Registry) -> None:
        self.case, self.window = case, int(case.workload["window"])
        self.subjects = {i: prepare_subject(replace(case, layers=(i,)), registry) for i in sorted(case.layers)}
        self.model, tokenizer = _language_model(case, next(iter(self.subjects.values())))
        self.passage = take_passage(tokenizer, evaluation_text(), case.tokens, case.seed)
        first = min(self.subjects)
        self.dense = dense_states(self.model, case.weights_sha256, self.passage.ids[:-1], self.window, first)
        self.steps = case.tokens // self.window
        self.input_sha256 = sha256_of(self.passage.ids)
        self._open(registry)
        self.scores: list[Tensor] = []
        self.routings: dict[int, list[Routing]] = {index: [] for index in self.subjects}
        self.densities: dict[int, list[Metric]] = {}

    def _open(self, registry: Registry) -> None:
        """Load the changed layers into the backend, and make the modules that stand in for the FFNs."""
        folded = self.case.execution.folded
        stores = {index: subject.layer.store for index, subject in self.subjects.items()}
        backend = registry.get("backend", self.case.backend.name).create(self.case.backend.params)
        self.session = backend.load(
            {index: fold_store(store) if folded else store for index, store in stores.items()},
            {i: subject.spec.folded() if folded else subject.spec for i, subject in self.subjects.items()},
        )
        self.calls: list[Call] = []
        self.blocks = {}
        for index, subject in self.subjects.items():
            executor = self.session.layer(index)
            executor = Folded(executor, stores[index]) if folded else executor
            draws = substream(self.case.seed, "routing", index)
            self.blocks[index] = MoEBlock(index, subject, executor, self.calls, draws)

    def begin_turn(self) -> None:
        """Nothing to make ready: every step writes anew."""

    def run(self, step: int) -> list[Call]:
        """Judge the window ``step``; return what the changed layers did."""
        self.calls.clear()
        part = slice(step * self.window, (step + 1) * self.window)
        for block in self.blocks.values():
            block.token_ids_T = self.passage.ids[:-1][part]
        with exchanged(self.model, self.blocks):
            final_TH = forward_from(self.model, self.dense.first, self.dense.entering[part])
        ids, bytes_T = self.passage.ids[1:][part], self.passage.bytes_T[part]
        self.scores.append(score(self.model.lm_head, final_TH, self.dense.final[part], ids, bytes_T))
        for call in self.calls:
            self.routings[call.block.index].append(call.routing)
            if call.block.index not in self.densities:
                self.densities[call.block.index] = density(call.block.subject.layer.store, call.routing, call.x_TH)
        return list(self.calls)

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
        """Return quality with intervals and by window, and what routing and sparsity did.

        Routing figures are over all windows, densities over the first; with several layers they are means over layers.
        """
        joined = {index: _joined(parts) for index, parts in self.routings.items()}
        per_layer = [[*routing_metrics(joined[index]), *self.densities[index]] for index in self.subjects]
        expert_bytes = sum(subject.layer.store.nbytes for subject in self.subjects.values())
        metrics = [
            *quality_metrics(torch.cat(self.scores), substream(self.case.seed, "bootstrap")),
            *_means(per_layer),
            Metric("expert_bytes", float(expert_bytes), "byte"),
        ]
        series: list[Series] = [replace(load_series(joined[i], i), step=0) for i in joined]
        return Facts(tuple(metrics), tuple(series), tuple(self._items()), self.session.executed())

    def _items(self) -> list[Item]:
        """Return each window's mean scores, so that two methods can be compared window by window."""
        names = {"nll": "nll", "kl": "kl_to_dense", "agree": "top1_agreement"}
        task = f"text-{self.input_sha256[:12]}"
        return [
            Item(task, str(window), name, float(scores_TC[:, COLUMNS.index(column)].mean()))
            for window, scores_TC in enumerate(self.scores)
            for column, name in names.items()
        ]

    def close(self) -> None:
        """Free the backend's session."""
        self.session.close()


def _language_model(case: Case, subject: Subject) -> tuple[Any, Any]:
    """Return (model, tokenizer), loaded once per worker."""
    if not hasattr(subject.source, "language_model"):
        raise MoebenchError(f"model '{case.model}' has no language model around its layers; use model=smollm2.")
    if case.weights_sha256 not in _MODELS:
        _MODELS[case.weights_sha256] = subject.source.language_model()
    return _MODELS[case.weights_sha256]


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
