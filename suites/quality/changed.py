"""A language model with the layers of a case on one backend, window by window of a text. Imported by workers only.

Shape letters: T tokens, H hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
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


@contextlib.contextmanager
def attention_seen(model: Any, blocks: Sequence[MoEBlock]) -> Iterator[None]:
    """Tell each of ``blocks`` the attention weights of its decoder layer, until the context ends.

    Only attention of kind ``eager`` hands them out, so the whole model has that meanwhile; without blocks nothing
    changes.
    """
    if not blocks:
        yield
        return

    def tell(block: MoEBlock) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            block.attn = output[1].detach()

        return hook

    kind = model.config._attn_implementation
    hooks = [model.model.layers[b.index].self_attn.register_forward_hook(tell(b)) for b in blocks]
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(kind)
        for handle in hooks:
            handle.remove()


class Changed:
    """The changed layers of a case, loaded into ``backend``, and the model around them. ``calls`` are of one window.

    ``prompt`` is how many tokens of each window are its prompt, None where nobody asks.
    """

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
        folded = case.execution.folded
        stores = {index: subject.layer.store for index, subject in subjects.items()}
        params = case.backend.params if backend == case.backend.name else {}
        self.session = (
            registry.get("backend", backend)
            .create(params)
            .load(
                {index: fold_store(store) if folded else store for index, store in stores.items()},
                {i: subject.spec.folded() if folded else subject.spec for i, subject in subjects.items()},
            )
        )
        self.calls: list[Call] = []
        self.prompt: int | None = None
        self.blocks: dict[int, MoEBlock] = {}
        for index, subject in subjects.items():
            executor = self.session.layer(index)
            executor = Folded(executor, stores[index]) if folded else executor
            dense = ffn_of(model.model.layers[index])
            draws = substream(case.seed, "routing", index)
            self.blocks[index] = block(index, subject, executor, self.calls, draws, dense)

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
            block.prompt = self.prompt
        seen = [block for block in self.blocks.values() if "attn" in block.subject.layer.router.needs]
        with exchanged(self.model, self.blocks), attention_seen(self.model, seen):
            return forward_from(self.model, dense.first, dense.entering[part])

    def close(self) -> None:
        """Free the backend's session."""
        self.session.close()
