"""A language model with the layers of a case on one backend, window by window of a text. Imported by workers only.

Shape letters: T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...contracts import Case, MoebenchError, Registry
from ...moe.fold import Folded, fold_store
from ...moe.routing import Routing
from ..models import ModelSource, substream
from ..models.smollm2_jobs import ffn_of
from ..subject import Subject
from .block import Call, MoEBlock
from .language_model import DenseStates, exchanged, forward_from

_MODELS: dict[str, tuple[Any, Any]] = {}


def language_model(case: Case, source: ModelSource) -> tuple[Any, Any]:
    """Return (model, tokenizer), loaded once per worker."""
    if not hasattr(source, "language_model"):
        raise MoebenchError(f"model '{case.model}' has no language model around its layers; use model=smollm2.")
    if case.weights_sha256 not in _MODELS:
        _MODELS[case.weights_sha256] = source.language_model()
    return _MODELS[case.weights_sha256]


class Changed:
    """The changed layers of a case, loaded into ``backend``, and the model around them. ``calls`` are of one window."""

    def __init__(
        self,
        case: Case,
        registry: Registry,
        backend: str,
        subjects: Mapping[int, Subject],
        model: Any,
        block: type[MoEBlock] = MoEBlock,
    ) -> None:
        self.model = model
        self.folded = case.execution.folded
        params = case.backend.params if backend == case.backend.name else {}
        maker = registry.get("backend", backend).create(params)
        self.session = self._loaded(maker, subjects)
        whole = {index: subject for index, subject in map(_with_nothing_left_out, subjects.items()) if subject}
        self.sessions = [self.session, *([self._loaded(maker, whole)] if whole else [])]
        self.calls: list[Call] = []
        self.blocks: dict[int, MoEBlock] = {}
        for index, subject in subjects.items():
            dense = ffn_of(model.model.layers[index])
            draws = substream(case.seed, "routing", index)
            made = self._executor(self.session, index, subject)
            first = self._executor(self.sessions[1], index, whole[index]) if index in whole else None
            self.blocks[index] = block(index, subject, made, self.calls, draws, dense, first)

    def _loaded(self, maker: Any, subjects: Mapping[int, Subject]) -> Any:
        """Return the backend's session of all layers, folded where the case is."""
        stores = {index: subject.layer.store for index, subject in subjects.items()}
        return maker.load(
            {index: fold_store(store) if self.folded else store for index, store in stores.items()},
            {i: subject.spec.folded() if self.folded else subject.spec for i, subject in subjects.items()},
        )

    def _executor(self, session: Any, index: int, subject: Subject) -> Any:
        executor = session.layer(index)
        return Folded(executor, subject.layer.store) if self.folded else executor

    def forward(
        self, dense: DenseStates, part: slice, ids_T: Tensor, forced: Mapping[int, Routing] | None = None
    ) -> Tensor:
        """Return what the head reads in window ``part`` of the text, [T, H]; ``calls`` says what the layers did.

        With ``forced`` Routings by layer the routers are not asked.
        """
        self.calls.clear()
        for index, block in self.blocks.items():
            block.token_ids_T = ids_T[part]
            block.dense_x_TH = dense.reading[index][part] if index in dense.reading else None
            block.forced = None if forced is None else forced[index]
        with exchanged(self.model, self.blocks):
            return forward_from(self.model, dense.first, dense.entering[part])

    def close(self) -> None:
        """Free the backend's sessions."""
        for session in self.sessions:
            session.close()


def _with_nothing_left_out(item: tuple[int, Subject]) -> tuple[int, Subject | None]:
    """Return a layer whose sparsity has a dense prefix as it is in that prefix, None for any other layer."""
    index, subject = item
    sparsity, store = subject.spec.sparsity, subject.layer.store
    if sparsity is None or sparsity.dense_prefix == 0 or store.sparsity is None:
        return index, None
    layer = replace(subject.layer, store=replace(store, sparsity=None))
    return index, replace(subject, layer=layer, spec=replace(subject.spec, sparsity=None))
