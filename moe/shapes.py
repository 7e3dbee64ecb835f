"""The shape of a model's MoE layers, known without loading a tensor, so that the parent process can plan with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..contracts import Selection, expert_matrices


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model: ``experts`` 0 means that its FFNs are dense and ``width`` is the width of the whole FFN.

    ``moe_layers`` are the decoder indices that hold experts (for a dense model: those that a split may replace).
    ``shared_width`` is the width of all shared experts together. ``selection`` is the model's own top-k. ``heads`` is
    that of experts that are attentions, 0 where experts are FFNs.
    """

    hidden: int
    width: int
    experts: int
    layers: int
    moe_layers: tuple[int, ...]
    selection: Selection
    shared_width: int = 0
    activation: str = "silu"
    gated: bool = True
    heads: int = 0

    @property
    def matrices(self) -> int:
        """How many matrices of hidden x width an expert owns."""
        return expert_matrices(self.gated, self.heads)

    @property
    def top_k(self) -> int:
        """Experts per token of the model's own routing."""
        return self.selection.k

    def expert_bytes(self, element_size: int) -> int:
        """Bytes of the routed experts' weights of one layer, dense, at ``element_size`` bytes per weight."""
        return self.experts * self.matrices * self.hidden * self.width * element_size

    def with_(self, **changes: Any) -> ModelShape:
        """Return the shape with some sizes replaced."""
        return replace(self, **changes)
