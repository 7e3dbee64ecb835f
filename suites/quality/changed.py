"""A language model with the layers of a case on one backend, window by window of a text. Imported by workers only.

Shape letters: T tokens, H hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...contracts import Case, Registry
from ...moe.fold import Folded, fold_store
from ...moe.routing import Routing
from ..models import substream
from ..models.smollm2_jobs import ffn_of
from ..subject import Subject
from .attention import QuantizedAttention
from .block import Call, MoEBlock
from .language_model import DenseStates, exchanged, forward_from
from .sparse_attention import SparseAttention


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

    ``attention`` holds what of the attention in these layers a plan gives bits, which is quantized, too;
    ``sparse_attention`` what of it leaves out inputs.
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
        self.folded = case.execution.folded
        params = case.backend.params if backend == case.backend.name else {}
        maker = registry.get("backend", backend).create(params)
        self.session = self._loaded(maker, subjects)
        whole = {index: subject for index, subject in map(_with_nothing_left_out, subjects.items()) if subject}
        self.sessions = [self.session, *([self._loaded(maker, whole)] if whole else [])]
        self.calls: list[Call] = []
        self.prompt: int | None = None
        self.blocks: dict[int, MoEBlock] = {}
        for index, subject in subjects.items():
            dense = ffn_of(model.model.layers[index])
            draws = substream(case.seed, "routing", index)
            made = self._executor(self.session, index, subject)
            first = self._executor(self.sessions[1], index, whole[index]) if index in whole else None
            self.blocks[index] = block(index, subject, made, self.calls, draws, dense, first)
        params = registry.params("quantization", case.quantization)
        self.attention = QuantizedAttention(model, params, attention_bits(subjects))
        self.sparse_attention = SparseAttention(case, registry, model, self.blocks, self.attention)

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
            block.prompt = self.prompt
        seen = [block for block in self.blocks.values() if "attn" in block.subject.layer.router.needs]
        with self.applied(), attention_seen(self.model, seen):
            return forward_from(self.model, dense.first, dense.entering[part])

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Change the model until the block ends: its FFNs, and the attention that is quantized or leaves out inputs."""
        with exchanged(self.model, self.blocks), self.attention.applied(), self.sparse_attention.applied():
            yield

    def close(self) -> None:
        """Free the backend's sessions."""
        for session in self.sessions:
            session.close()


def attention_bits(subjects: Mapping[int, Subject]) -> dict[int, int]:
    """Return the bits of each layer's attention, of the layers whose plan gives it some."""
    found = {index: subject.layer.bits for index, subject in subjects.items()}
    return {index: bits.attention for index, bits in found.items() if bits is not None and bits.attention is not None}


def _with_nothing_left_out(item: tuple[int, Subject]) -> tuple[int, Subject | None]:
    """Return a layer whose sparsity has a dense prefix as it is in that prefix, None for any other layer."""
    index, subject = item
    sparsity, store = subject.spec.sparsity, subject.layer.store
    if sparsity is None or sparsity.dense_prefix == 0 or store.sparsity is None:
        return index, None
    layer = replace(subject.layer, store=replace(store, sparsity=None))
    return index, replace(subject, layer=layer, spec=replace(subject.spec, sparsity=None))
