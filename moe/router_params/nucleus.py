"""Parameters of top-p routing. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ...contracts import Descriptor
from ..shapes import ModelShape
from .dynamic import AnyNumber


@dataclass(frozen=True)
class TopP(AnyNumber):
    """Top-p (arXiv 2403.07652): the fewest experts whose probabilities add up to at least ``p``.

    ``renormalize`` makes their weights sum to one, as in BlockFFN's comparison; otherwise they are the probabilities,
    as in the code released with the paper. Its p is 0.4; losses ``switch`` and ``entropy`` go with it.
    """

    pipeline: ClassVar[bool] = True

    p: float = 0.4
    renormalize: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"p={self.p} must lie in (0, 1]")

    def max_k(self, shape: ModelShape) -> int:
        """Return ceil(p E), which even probabilities need."""
        return min(math.ceil(self.p * shape.experts), shape.experts)


DESCRIPTORS = [
    Descriptor(
        "routing",
        "top_p",
        "fewest experts that hold the share p",
        "moebench.moe.routers.nucleus:build",
        TopP,
        aliases=("top-p", "topp"),
    ),
]
