"""Parameters of the uncertainty-aware router. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...contracts import Descriptor
from .ffn_only import SoftmaxTopK


@dataclass(frozen=True)
class MoFME(SoftmaxTopK):
    """MoFME's uncertainty-aware router (arXiv 2312.16610): in training, weights in units of their own uncertainty.

    Inference is softmax over the top-k logits. Training repeats the router ``passes`` times with ``dropout`` on its
    input and replaces each weight r by (r - mean) / sqrt(variance) of these passes, so weights may be negative. The
    paper normalises by the inverse root of the covariance; with fewer passes than experts that is singular, and we
    keep its diagonal. The released code repeats a router that has no dropout: ``dropout=0`` does the same, and leaves
    weights of zero.
    """

    renormalize: ClassVar[bool] = True

    passes: int = 5
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.passes < 2:
            raise ValueError(f"passes={self.passes} must be at least 2, or there is no variance")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")


DESCRIPTORS = [
    Descriptor(
        "routing",
        "mofme",
        "MoFME: top-k with weights calibrated by dropout passes",
        "moebench.moe.routers.mofme:build",
        MoFME,
    ),
]
