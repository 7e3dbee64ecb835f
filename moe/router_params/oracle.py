"""Parameters of the two ends of a scale for routers: the experts that matter most, and some by chance; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...contracts import Descriptor, Selection
from ..plugins import TopK
from ..shapes import ModelShape


@dataclass(frozen=True)
class OwnWeights:
    """``k`` experts of each token, None as many as the layer's own selection; weights are those of its own rule."""

    pipeline: ClassVar[bool] = True
    k: int | None = None

    def rule(self, shape: ModelShape) -> Selection:
        """Return the layer's own selection with ``k``, whose choice alone is replaced."""
        return TopK(self.k).selection(shape)

    def selection(self, shape: ModelShape) -> Selection | None:
        """Return None: what is chosen does not follow from logits."""
        return None

    def kinds(self, shape: ModelShape) -> tuple[str, ...]:
        """Return ``ffn`` for every expert."""
        self.rule(shape)
        return ("ffn",) * shape.experts

    def max_k(self, shape: ModelShape) -> int:
        """Return k."""
        return self.rule(shape).k


@dataclass(frozen=True)
class Oracle(OwnWeights):
    """Oracle: the experts that make most of the output of all, at the cost of running them all.

    Expert e makes g_e f_e(x) . y of it, with y = sum_e g_e f_e(x) and g the layer's own weights before any is left out
    (1 for slices of a dense FFN, whose y is the FFN). It is what ``split`` fits its router to, so the part of the way
    from ``random`` to here is what a fitted router has learned. It is no upper bound of quality: the best k experts
    together are not always the k best ones.
    """


@dataclass(frozen=True)
class Random(OwnWeights):
    """Random: distinct experts drawn uniformly for each token, with the weights that the layer's own rule gives them.

    The floor below every router that has learned anything.
    """


DESCRIPTORS = [
    Descriptor(
        "routing", "oracle", "the experts that contribute most", "moebench.moe.routers.oracle:build_oracle", Oracle
    ),
    Descriptor("routing", "random", "distinct experts by chance", "moebench.moe.routers.oracle:build_random", Random),
]
