"""Parameters of routers outside the backbone. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ...contracts import Descriptor
from .ffn_only import OneExpert


@dataclass(frozen=True)
class ReadMe(OneExpert):
    """Read-ME (arXiv 2410.19123): a small causal transformer on token ids picks one expert for all layers, weight 1.

    ``layers`` pre-norm attention blocks of ``width`` and ``heads`` with rotary positions, whose attention logits are
    divided by ``normalizer`` (1 in the released code, not the square root of a head's width), then a two-layer map to
    the experts. Its embedding starts as the first channels of the language model's in the paper and is seeded here.
    ``vocabulary`` is the number of token ids.
    """

    layers: int = 1
    width: int = 64
    heads: int = 4
    normalizer: float = 1.0
    vocabulary: int = 65_536

    def __post_init__(self) -> None:
        if self.layers < 1 or self.heads < 1 or self.vocabulary < 1:
            raise ValueError("layers, heads and vocabulary must be at least 1")
        if self.width % (2 * self.heads):
            raise ValueError(f"width={self.width} must be a multiple of 2 x heads={self.heads}: positions turn pairs")
        if self.normalizer <= 0:
            raise ValueError(f"normalizer={self.normalizer} must be positive")


DESCRIPTORS = [
    Descriptor(
        "routing",
        "read_me",
        "Read-ME: pre-gating on token ids for all layers",
        "moebench.moe.routers.pregate:build",
        ReadMe,
        aliases=("pregate",),
    ),
]
