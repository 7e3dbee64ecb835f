"""A language model with the layers of a case on one backend, window by window of a text. Imported by workers only.

Shape letters: T tokens, H hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
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

    ``attention`` holds what of the attention in these layers a plan gives bits, which is quantized, too.
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
        params = registry.params("quantization", case.quantization)
        self.attention = QuantizedAttention(model, params, attention_bits(subjects))

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
        """Change the model until the block ends: its FFNs, and the attention that is quantized."""
        with exchanged(self.model, self.blocks), self.attention.applied():
            yield

    def close(self) -> None:
        """Free the backend's session."""
        self.session.close()


def attention_bits(subjects: Mapping[int, Subject]) -> dict[int, int]:
    """Return the bits of each layer's attention, of the layers whose plan gives it some."""
    found = {index: subject.layer.bits for index, subject in subjects.items()}
    return {index: bits.attention for index, bits in found.items() if bits is not None and bits.attention is not None}
