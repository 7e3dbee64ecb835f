"""The trial of suite ``quantization``: layers quantized one by one, then the model with them on text.

A step is a layer, and after these a window of text. Each layer is quantized anew, so that what it takes is what was
measured, and the model is then judged with that very layer. Nothing counts but what passes: the codes decode to the
same numbers from their file, and the backend's output is that of the float64 oracle on the numbers from the file.
Imported by workers only. Shape letters: T tokens, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ...contracts import Case, Check, Cost, ExecutedPath, Facts, Registry
from ...moe.experts import ExpertStore
from ...moe.fold import Folded, fold_store
from ...moe.oracle import compare, reference
from ...moe.recipe import Recipe
from ..accuracy import text_refusal
from ..base import NONE
from ..digest import sha256_of
from ..models import ModelSource
from ..subject import Batch, Subject, build_subject, make_batch, prepare_subject
from .block import Call, relative_error
from .layer_figures import Layer, layer_metrics, layer_series, unjudged_metrics, weight_squares
from .on_disk import mistake, written
from .timed import TimedStage
from .trial import AccuracyTrial

HELD_OUT = 1024
"""So many tokens at most are given to a layer alone: the figure of each is one number, and its spread is small."""


@dataclass(frozen=True)
class Quantized:
    """A layer whose codes are in order: its figures, and what the backend made of ``batch`` with ``read``, its experts
    as they come from their file (or as they are, where none could be written)."""

    figures: Layer
    subject: Subject
    read: ExpertStore
    batch: Batch
    y_TH: Tensor

    def check(self) -> Check:
        """Compare the output with the oracle's on the experts from the file."""
        wanted = reference(self.read, self.batch.routing, self.batch.x_TH, self.subject.layer.shared)
        return compare(self.y_TH, wanted, self.batch.x_TH.dtype)


class QuantizationTrial:
    """The layers of a case, and after them its text where the method can be judged on one."""

    state: Literal["none"] = "none"

    def __init__(self, case: Case, registry: Registry) -> None:
        self.case, self.registry = case, registry
        self.layers = sorted(case.layers)
        self.unjudged = text_refusal(case, registry)
        windows = 0 if self.unjudged else case.tokens // int(case.workload["window"])
        self.steps = len(self.layers) + windows
        self.done: dict[int, Quantized] = {}
        self.text: AccuracyTrial | None = None
        self.executed = ExecutedPath("")
        self.input_sha256 = sha256_of(*(self._held_out(index) for index in self.layers))

    def _held_out(self, index: int) -> Tensor:
        case = self.case
        source: ModelSource = self.registry.get("model", case.model.name).create(case.model.params)
        traffic = self.registry.get("traffic", case.traffic.name).create(case.traffic.params)
        x_TH: Tensor = traffic.hidden(source, index, min(case.tokens, HELD_OUT), 0, case.seed)
        return x_TH

    def begin_turn(self) -> None:
        """Nothing to make ready: every step writes anew."""

    def run(self, step: int) -> Quantized | Check | list[Call]:
        """Quantize a layer, or judge a window of text with all of them; a Check says what is wrong with a layer's
        codes."""
        if step < len(self.layers):
            return self._quantized(self.layers[step])
        if self.text is None:
            self.text = AccuracyTrial(self.case, self.registry, {i: made.subject for i, made in self.done.items()})
        return self.text.run(step - len(self.layers))

    @torch.no_grad()
    def _quantized(self, index: int) -> Quantized | Check:
        case = replace(self.case, layers=(index,))
        recipe = Recipe.of(case, self.registry)
        stage = TimedStage(*recipe.quantization)
        subject = build_subject(case, self.registry, replace(recipe, quantization=stage), None)
        plain = prepare_subject(replace(case, quantization=NONE, sparsity=NONE), self.registry)
        store, dense = subject.layer.store, plain.layer.store
        disk = written(store)
        problem = mistake(store, dense, disk)
        if problem:
            return Check(False, reason=f"layer {index}: {problem}")
        held_out = replace(case, tokens=min(case.tokens, HELD_OUT))
        batch = make_batch(held_out, self.registry, subject, 0)
        x_TH = make_batch(held_out, self.registry, plain, 0).x_TH  # as it was before any smoothing
        exact = reference(dense, batch.routing, x_TH, plain.layer.shared).y_TH
        found = reference(store, batch.routing, batch.x_TH, subject.layer.shared).y_TH
        folded = hasattr(recipe.quantization.params, "fold")  # hidden channels may be smoothed where the input is not
        figures = Layer(
            store=store,
            disk=disk,
            elapsed=None if case.quantization.name == "none" else stage.elapsed,
            weight_squares_E2=None if folded else weight_squares(store, dense),
            error_T=relative_error(found, exact),
        )
        read = store if disk is None else disk.store
        self.done[index] = Quantized(figures, subject, read, batch, self._output(case, subject, batch))
        return self.done[index]

    def _output(self, case: Case, subject: Subject, batch: Batch) -> Tensor:
        """Return what the case's backend makes of a batch, with what is always on, in the dtype of its input."""
        layer, folded = subject.layer, case.execution.folded
        store, spec = (fold_store(layer.store), subject.spec.folded()) if folded else (layer.store, subject.spec)
        backend = self.registry.get("backend", case.backend.name).create(case.backend.params)
        session = backend.load({0: store}, {0: spec})
        executor = Folded(session.layer(0), layer.store) if folded else session.layer(0)
        y_TH: Tensor = executor(batch.x_TH, *batch.inputs, out_TH=None)
        self.executed = session.executed()
        session.close()
        return y_TH if layer.shared is None else layer.shared.added_to(y_TH, batch.x_TH).to(batch.x_TH.dtype)

    def verify(self, step: int, output: Quantized | Check | list[Call]) -> Check:
        """Return what is wrong with a layer, or the oracle's word on its output; of a window as ``accuracy`` does."""
        if isinstance(output, Check):
            return output
        if isinstance(output, Quantized):
            return output.check()
        if self.text is None:
            raise RuntimeError("a window was to be verified before it was run; run the step first.")
        return self.text.verify(step - len(self.layers), output)

    def cost(self, step: int) -> Cost:
        """Return nothing: there is no time to compare work with."""
        return Cost(0.0, 0.0)

    def facts(self) -> Facts:
        """Return bytes and errors by layer and expert, and quality on text, or why there is none."""
        layers = {index: made.figures for index, made in self.done.items()}
        own, series = layer_metrics(layers, self.case.seed), layer_series(layers)
        why = [self.unjudged or ""]
        if any(layer.disk is None for layer in layers.values()):
            why.append(f"no file is written: the codes of quantization '{self.case.quantization}' are a plug-in's own")
        notes = {"reason": "; ".join(filter(None, why))}
        if self.text is None:
            return Facts((*own, *unjudged_metrics()), series, (), self.executed, notes)
        judged = self.text.facts()
        names = {metric.name for metric in own}
        metrics = (*own, *(metric for metric in judged.metrics if metric.name not in names))
        return Facts(metrics, (*series, *judged.series), judged.items, judged.executed, notes)

    def close(self) -> None:
        """Free the backend's session."""
        if self.text is not None:
            self.text.close()
