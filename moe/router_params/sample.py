"""Parameters of routers that decide for a whole sample from its raw input. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...contracts import Descriptor, Selection
from ..shapes import ModelShape
from .ffn_only import OneExpert


@dataclass(frozen=True)
class AdvMoE(OneExpert):
    """AdvMoE (arXiv 2308.10110): a small residual network on the image picks one expert for all layers, weight 1.

    Three stages of ``blocks`` basic blocks with 16, 32 and 64 channels. The gradient of the weight goes straight
    through to the score of the selected expert. The released code computes all experts, gives the others weight 0, and
    so reaches their scores as well: ``released_mask``, at E times the work.
    """

    beyond_text: ClassVar[str] = "features"

    blocks: int = 3
    released_mask: bool = False

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise ValueError(f"blocks={self.blocks} must be at least 1")

    def selection(self, shape: ModelShape) -> Selection | None:
        """Return the selection of the one best expert; None for the mask, whose weights are no top-k's."""
        return None if self.released_mask else super().selection(shape)

    def max_k(self, shape: ModelShape) -> int:
        """Return 1, or the number of experts where all are computed."""
        return shape.experts if self.released_mask else 1


DESCRIPTORS = [
    Descriptor(
        "routing",
        "advmoe",
        "AdvMoE: one expert per image for all layers",
        "moebench.moe.routers.sample:build",
        AdvMoE,
    ),
]
