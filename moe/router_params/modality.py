"""Parameters of routers of multi-modal models. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...contracts import Descriptor
from ..shapes import ModelShape
from .ffn_only import SoftmaxTopK


@dataclass(frozen=True)
class MoIIE(SoftmaxTopK):
    """MoIIE (arXiv 2508.09779): a gate per modality over its own quarter of the experts and a half that both share.

    Experts are ordered vision (E/4), shared (E/2), language (E/4); modality 0 is language and 1 is vision. Top-k of
    softmax over the visible, renormalised. Two options do what the released code does instead: ``released_ids`` maps
    place j of the language gate to expert j + 1, which is right for 4 experts alone (it must be j + E/4);
    ``released_boundary`` counts a token as vision only where its successor is vision too, so that the last token of
    an image goes through the language gate.
    """

    renormalize: ClassVar[bool] = True

    released_ids: bool = False
    released_boundary: bool = False

    @property
    def causal(self) -> bool:
        """Whether later tokens leave earlier ones alone."""
        return not self.released_boundary

    def available(self, shape: ModelShape) -> int:
        """Return how many experts one modality sees."""
        if shape.experts % 4:
            raise ValueError(f"{shape.experts} experts cannot be cut into quarters, as the groups of MoIIE are")
        return 3 * shape.experts // 4

    def visible(self, shape: ModelShape) -> tuple[range, range]:
        """Return the expert ids that language sees, and those that vision sees."""
        width = self.available(shape)
        first = 1 if self.released_ids else shape.experts // 4
        return range(first, first + width), range(width)


@dataclass(frozen=True)
class UniMoE(SoftmaxTopK):
    """Uni-MoE (arXiv 2405.11273): softmax over the top-2 logits, as Mixtral; modalities enter its losses only."""

    renormalize: ClassVar[bool] = True


DESCRIPTORS = [
    Descriptor("routing", "moiie", "MoIIE: one gate per modality", "moebench.moe.routers.modality:build", MoIIE),
    Descriptor("routing", "uni_moe", "Uni-MoE top-2, renormalised", "moebench.moe.routers.topk:build", UniMoE),
]
