"""A language model of a case whose changed layers can drop experts, and its text.

Shape letters: T tokens, H hidden.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...contracts import Case, Check, ExecutedPath, Metric, Registry
from ...moe.dropping import dropped
from ..digest import sha256_of
from ..models import ModelSource, substream
from ..quality.block import Call, MoEBlock
from ..quality.bootstrap import metric_of
from ..quality.changed import Changed
from ..quality.language_model import exchanged, language_model
from ..quality.passage import Passage, take_passage
from ..quality.scores import ROWS
from ..subject import DTYPES, prepare_subject
from ..text import calibration_text, evaluation_text


class DroppingBlock(MoEBlock):
    """A changed layer without the outputs of ``gone``; of a call the dense layer is not asked: no error is known."""

    gone: frozenset[int] = frozenset()

    @torch.no_grad()
    def forward(self, x_BTH: Tensor) -> Tensor:
        """Return y in the shape and dtype of ``x_BTH``, and remember the call."""
        x_TH = x_BTH.flatten(0, -2).to(DTYPES[self.subject.spec.dtype])
        routing = dropped(self.route(x_TH, [call.routing for call in self.calls]), self.gone)
        read_TH = self.subject.layer.reads(x_TH)
        y_TH = self.computed(read_TH, routing)
        self.calls.append(Call(self, read_TH, routing, y_TH, x_TH.new_empty(0), routing, self.prefix(len(x_TH))))
        return y_TH.to(x_BTH.dtype).view_as(x_BTH)


class Scene:
    """The model, a passage of the evaluation text, and its windows; ``calls`` are of the window run last."""

    def __init__(self, case: Case, registry: Registry) -> None:
        self.case, self.registry, self.window = case, registry, int(case.workload["window"])
        source: ModelSource = registry.get("model", case.model.name).create(case.model.params)
        self.shape = registry.params("structure", case.structure).reshape(source.shape)
        subjects = {i: prepare_subject(replace(case, layers=(i,)), registry) for i in sorted(case.layers)}
        self.model, self.tokenizer = language_model(case, source)
        self.passage = take_passage(self.tokenizer, evaluation_text(), case.tokens, case.seed)
        self.input_sha256 = sha256_of(self.passage.ids)
        self.changed = None
        if subjects:
            self.changed = Changed(case, registry, case.backend.name, subjects, self.model, DroppingBlock)

    @property
    def layers(self) -> Any:
        """The decoder layers."""
        return self.model.model.layers

    @property
    def blocks(self) -> Mapping[int, DroppingBlock]:
        """The changed layers by decoder index."""
        return self.changed.blocks if self.changed else {}  # type: ignore[return-value]

    @property
    def calls(self) -> list[Call]:
        """What the changed layers did in the last window."""
        return self.changed.calls if self.changed else []

    def calibration(self, tokens: int) -> Passage:
        """Return a passage of the calibration text that the case's seed decides."""
        return take_passage(self.tokenizer, calibration_text(), tokens, substream(self.case.seed, "probe calibration"))

    def windows(self, passage: Passage | None = None) -> list[Tensor]:
        """Return the tokens that are read, window by window, int64 [T]."""
        return list(torch.split((passage or self.passage).ids[:-1], self.window))

    @contextlib.contextmanager
    def without(self, experts: Sequence[tuple[int, int]]) -> Iterator[None]:
        """Drop the outputs of ``experts``, as (layer, id), until the block ends."""
        for layer, block in self.blocks.items():
            block.gone = frozenset(expert for place, expert in experts if place == layer)
        try:
            yield
        finally:
            for block in self.blocks.values():
                block.gone = frozenset()

    @torch.no_grad()
    def forward(self, ids_T: Tensor, **options: Any) -> Tensor:
        """Return what the head reads of one window, [T, H]; ``options`` go to the decoder."""
        self.calls.clear()
        for block in self.blocks.values():
            block.token_ids_T = ids_T
        with self.exchanged():
            final_TH: Tensor = self.model.model(ids_T[None], **{"use_cache": False, **options}).last_hidden_state[0]
        return final_TH

    def exchanged(self) -> contextlib.AbstractContextManager[None]:
        """Put the changed layers, and the attention that is quantized with them, in place until the block ends."""
        return self.changed.applied() if self.changed else contextlib.nullcontext()

    def finals(self) -> Tensor:
        """Return what the head reads of the whole passage, [T, H]."""
        return torch.cat([self.forward(ids_T) for ids_T in self.windows()])

    def residuals(self, ids_T: Tensor) -> list[Tensor]:
        """Run one window and return the residual stream after each decoder layer, [T, H] each."""
        states: list[Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda m, i, output: states.append(state(output))) for layer in self.layers
        ]
        try:
            self.forward(ids_T)
        finally:
            for hook in hooks:
                hook.remove()
        return states

    @torch.no_grad()
    def undropped(self, ids_T: Tensor, zeroed: Sequence[tuple[int, int]] = ()) -> Tensor:
        """Return what the head reads of one window with layers that know nothing of dropping, [T, H].

        The outputs of experts ``zeroed`` have no weights there: their ``down`` is zero, in a copy of their layer.
        """
        calls: list[Call] = []
        plain = {
            index: MoEBlock(index, block.subject, block.executor, calls, block.seed, block.dense, block.whole)
            for index, block in self.blocks.items()
        }
        for index in {layer for layer, _ in zeroed}:
            gone = [e for layer, e in zeroed if layer == index]
            plain[index].executor = self._without_weights(index, gone)
            if plain[index].whole is not None:
                plain[index].whole = self._without_weights(index, gone, whole=True)
        for block in plain.values():
            block.token_ids_T = ids_T
        attention = self.changed.attention.applied() if self.changed else contextlib.nullcontext()
        with exchanged(self.model, plain), attention:
            final_TH: Tensor = self.model.model(ids_T[None], use_cache=False).last_hidden_state[0]
        return final_TH

    def _without_weights(self, index: int, experts: Sequence[int], whole: bool = False) -> Any:
        """Return the executor of one layer in which ``experts`` have a ``down`` of zeros; ``whole``: dense else."""
        subject = self.blocks[index].subject
        store = subject.layer.store
        down_NHF = store.dense(DTYPES[subject.spec.dtype])[1].clone()
        down_NHF[[store.slots[expert] for expert in experts]] = 0.0
        backend = self.registry.get("backend", self.case.backend.name).create(self.case.backend.params)
        store, spec = replace(store, down=down_NHF), subject.spec
        if whole:
            store, spec = replace(store, sparsity=None), replace(spec, sparsity=None)
        return backend.load({index: store}, {index: spec}).layer(index)

    @property
    def quantized(self) -> bool:
        """Whether a changed layer has packed weights, of which none can be set to zero."""
        return any(block.subject.layer.store.quantized for block in self.blocks.values())

    def call_checks(self) -> list[Check]:
        """Return what the float64 oracle says of every changed layer in the last window."""
        return [call.check() for call in self.calls]

    @torch.no_grad()
    def losses(self, final_TH: Tensor) -> Tensor:
        """Return (nats, bytes, 1) of every predicted token, float64 [T, 3]."""
        pairs = zip(torch.split(final_TH, ROWS), torch.split(self.passage.ids[1:], ROWS), strict=True)
        nats = [-self.model.lm_head(f).double().log_softmax(-1).gather(1, n[:, None])[:, 0] for f, n in pairs]
        return torch.stack([torch.cat(nats), self.passage.bytes_T, torch.ones(len(final_TH)).double()], dim=1)

    def quality(self, losses_T3: Tensor, prefix: str = "") -> list[Metric]:
        """Return perplexity and bits per byte, with intervals."""
        seed = substream(self.case.seed, "bootstrap")
        return [
            metric_of(f"{prefix}perplexity", "1", losses_T3, lambda s: (s[..., 0] / s[..., 2]).exp(), seed),
            metric_of(
                f"{prefix}bits_per_byte", "bit/byte", losses_T3, lambda s: s[..., 0] / s[..., 1] / math.log(2), seed
            ),
        ]

    def executed(self) -> ExecutedPath | None:
        """Return what the backend ran, where layers are changed."""
        return self.changed.session.executed() if self.changed else None

    def close(self) -> None:
        """Free the backend's session."""
        if self.changed:
            self.changed.close()


def perplexity(losses_T3: Tensor) -> float:
    """Return exp of the mean nats per token."""
    return float(losses_T3[:, 0].mean().exp())


def state(output: Any) -> Tensor:
    """Return what a decoder layer puts out for its one window, [T, H]; transformers 5 gives a tensor, not a tuple."""
    states_BTH: Tensor = output if isinstance(output, Tensor) else output[0]
    return states_BTH[0]
