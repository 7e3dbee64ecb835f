"""Parameters of routers that decide for a whole sample from its raw input. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...contracts import Descriptor
from .ffn_only import OneExpert


@dataclass(frozen=True)
class AdvMoE(OneExpert):
    """AdvMoE (arXiv 2308.10110): a small residual network on the image picks one expert for all layers, weight 1.

    Three stages of ``blocks`` basic blocks with 16, 32 and 64 channels. The gradient of the weight goes straight
    through to the score of the selected expert; the released code computes all experts and so reaches the scores of
    the others as well.
    """

    beyond_text: ClassVar[str] = "features"

    blocks: int = 3

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise ValueError(f"blocks={self.blocks} must be at least 1")


DESCRIPTORS = [
    Descriptor(
        "routing",
        "advmoe",
        "AdvMoE: one expert per image for all layers",
        "moebench.moe.routers.sample:build",
        AdvMoE,
    ),
]
