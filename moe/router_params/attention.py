"""Parameters of BAM's mixture of attentions. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...contracts import Descriptor, Selection
from ..shapes import ModelShape


@dataclass(frozen=True)
class BAM:
    """BAM (arXiv 2408.08274): every attention for every token, weighted by softmax, so that no token is dropped.

    Experts are whole causal attentions, each with its own keys and values; the tokens of one call are one sequence.
    Keys and values that all attentions share, and the block that runs them beside the FFNs, are in
    ``moe.attention_mixture``.
    """

    structure: ClassVar[str] = "attention"

    def selection(self, shape: ModelShape) -> Selection:
        """Return softmax over all experts."""
        return Selection("softmax", shape.experts, renormalize=False)

    def kinds(self, shape: ModelShape) -> tuple[str, ...]:
        """Return ``sequence`` for every expert."""
        if not shape.heads:
            raise ValueError(f"attentions are mixed here, and the layer has FFNs; use axes.structure={self.structure}")
        return ("sequence",) * shape.experts

    def max_k(self, shape: ModelShape) -> int:
        """Return all experts."""
        return len(self.kinds(shape))


DESCRIPTORS = [
    Descriptor("routing", "bam", "BAM: a soft mixture of attentions", "moebench.moe.routers.attention:build", BAM),
]
