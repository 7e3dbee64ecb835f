"""Parameters of AdaMoE's null experts. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...contracts import Descriptor, Selection
from ..shapes import ModelShape


@dataclass(frozen=True)
class AdaMoE:
    """AdaMoE (arXiv 2406.13233): top-k of softmax over true and null experts; true weights sum to one.

    A null expert takes a slot and does nothing, so a token has 0 to k true experts: k n / (n + m) on average, where
    probabilities are even. ``null`` is m, None as many as the layer has true experts, so that half of the slots are
    true. The paper does not say m for Mixtral, where it raises k from 2 to 3 or 4.

    Its balance loss counts the nulls as one bucket (``switch`` with ``bucket`` and ``slots``).
    """

    pipeline: ClassVar[bool] = True

    k: int = 4
    null: int | None = None

    def selection(self, shape: ModelShape) -> Selection | None:
        """Return None: a fused kernel would renormalise over the nulls as well."""
        return None

    def kinds(self, shape: ModelShape) -> tuple[str, ...]:
        """Return the true experts, then the null ones, which are zero experts."""
        null = shape.experts if self.null is None else self.null
        if null < 0:
            raise ValueError(f"null={null} must not be negative")
        if not 0 < self.k <= shape.experts + null:
            raise ValueError(f"k={self.k} must lie between 1 and the {shape.experts + null} true and null experts")
        return ("ffn",) * shape.experts + ("zero",) * null

    def max_k(self, shape: ModelShape) -> int:
        """Return the most true experts that a token can have."""
        return min(self.k, shape.experts)


DESCRIPTORS = [
    Descriptor("routing", "adamoe", "AdaMoE null experts", "moebench.moe.routers.null:build", AdaMoE),
]
