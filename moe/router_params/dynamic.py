"""What routings share that give a token as many of the layer's own experts as its scores say. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ...contracts import Selection
from ..shapes import ModelShape


@dataclass(frozen=True)
class AnyNumber:
    """A token may have any number of the layer's experts, all of them at most."""

    def selection(self, shape: ModelShape) -> Selection | None:
        """Return None: no fixed top-k says which experts a token has."""
        return None

    def kinds(self, shape: ModelShape) -> tuple[str, ...]:
        """Return ``ffn`` for every expert."""
        return ("ffn",) * shape.experts

    def max_k(self, shape: ModelShape) -> int:
        """Return the number of experts."""
        return shape.experts
