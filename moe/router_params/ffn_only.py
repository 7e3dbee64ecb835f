"""What routings over a layer's own experts share: every expert id is an FFN. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...contracts import Selection
from ..shapes import ModelShape


@dataclass(frozen=True)
class SoftmaxTopK:
    """Top-``k`` of softmax over the layer's own experts; ``renormalize`` says whether the weights sum to one."""

    renormalize: ClassVar[bool] = False

    k: int = 2

    def available(self, shape: ModelShape) -> int:
        """Return how many experts one token may choose from."""
        return shape.experts

    def selection(self, shape: ModelShape) -> Selection:
        """Return the selection: it holds for the router's logits, whatever they were made from."""
        available = self.available(shape)
        if not 0 < self.k <= available:
            raise ValueError(f"k={self.k} must lie between 1 and the {available} experts that a token may use")
        return Selection("softmax", self.k, self.renormalize)

    def kinds(self, shape: ModelShape) -> tuple[str, ...]:
        """Return ``ffn`` for every expert."""
        return ("ffn",) * shape.experts

    def max_k(self, shape: ModelShape) -> int:
        """Return k."""
        return self.k


@dataclass(frozen=True)
class OneExpert:
    """The expert with the highest logit, with weight 1."""

    def selection(self, shape: ModelShape) -> Selection | None:
        """Return the selection of the one best expert."""
        return Selection("one", 1, renormalize=False)

    def kinds(self, shape: ModelShape) -> tuple[str, ...]:
        """Return ``ffn`` for every expert."""
        return ("ffn",) * shape.experts

    def max_k(self, shape: ModelShape) -> int:
        """Return 1."""
        return 1
