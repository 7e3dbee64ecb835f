"""Descriptors and parameters of structured compression: slimmer experts, or fewer by merging. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ...contracts import Descriptor
from ..shapes import ModelShape


def _check(shape: ModelShape, name: str, top: int) -> None:
    if shape.experts == 0:
        raise ValueError(f"the model's FFNs are dense; '{name}' wants experts")
    if not 0 < top <= shape.experts:
        raise ValueError(f"top={top} must lie between 1 and the layer's {shape.experts} experts")


@dataclass(frozen=True)
class Slim:
    """Keep ``width`` hidden channels of every expert, None half of them (SlimMoE's neuron slimming, arXiv 2506.18349).

    Kept are those of the largest first-order Taylor term, of the largest weights (``magnitude``), or some at
    ``random``. A structure sees one layer, so the loss of the Taylor term is not the model's distillation loss but the
    layer's: half the squared error of the routed output as a part of it, at the layer left out. Tokens go to their
    ``top`` best experts by the layer's gate, weighted by a softmax over these.
    """

    width: int | None = None
    by: Literal["taylor", "magnitude", "random"] = "taylor"
    top: int = 2

    def kept(self, width: int) -> int:
        """Return how many of ``width`` channels stay."""
        return max(1, width // 2) if self.width is None else self.width

    def reshape(self, shape: ModelShape) -> ModelShape:
        """Return the shape with the slimmer experts."""
        _check(shape, "slim", self.top)
        if not 0 < self.kept(shape.width) <= shape.width:
            raise ValueError(f"width={self.width} must lie between 1 and the experts' {shape.width} channels")
        return shape.with_(width=self.kept(shape.width))


@dataclass(frozen=True)
class Merge:
    """Average the experts to ``groups`` ones, None half of them, weighted by how many tokens have each.

    The busiest are the centres of groups; each other joins the one whose router row (``router``) or outputs on the
    calibration tokens (``outputs``) are most similar. ``align`` puts channels in the order of the centre's first. A
    token counts for its ``top`` best experts by the layer's gate. A selection by groups becomes one over all.
    """

    groups: int | None = None
    by: Literal["router", "outputs"] = "router"
    align: bool = True
    top: int = 2

    def kept(self, experts: int) -> int:
        """Return how many experts there will be."""
        return max(1, experts // 2) if self.groups is None else self.groups

    def reshape(self, shape: ModelShape) -> ModelShape:
        """Return the shape with one expert for each group."""
        _check(shape, "merge", self.top)
        kept, own = self.kept(shape.experts), shape.selection
        if not 0 < kept <= shape.experts:
            raise ValueError(f"groups={kept} must lie between 1 and the layer's {shape.experts} experts")
        return shape.with_(experts=kept, selection=replace(own, k=min(own.k, kept), groups=None))


DESCRIPTORS = [
    Descriptor(
        "structure", "slim", "every expert with fewer channels", "moebench.moe.transforms.compression:slimmed", Slim
    ),
    Descriptor("structure", "merge", "similar experts averaged", "moebench.moe.transforms.compression:merged", Merge),
]
