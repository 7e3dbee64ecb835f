"""Parameters of routings that retrieve a few of very many rank-1 experts. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from ...contracts import Descriptor, Selection
from ..shapes import ModelShape


@dataclass(frozen=True)
class Retrieval:
    """The ``k`` best of S x S places for each of ``heads`` queries, S the least with a place for every expert.

    Place i is expert i modulo their number, so that a few experts have two places where it is no square; an expert
    that is found twice has the sum of the weights.
    """

    structure: ClassVar[str] = "neurons"

    heads: int = 1
    k: int = 16

    def side(self, shape: ModelShape) -> int:
        """Return S."""
        return math.isqrt(shape.experts - 1) + 1

    def selection(self, shape: ModelShape) -> Selection | None:
        """Return None: there is no logit for each expert to select from."""
        return None

    def kinds(self, shape: ModelShape) -> tuple[str, ...]:
        """Return ``gather`` for every expert."""
        if shape.width != 1 or shape.heads:
            raise ValueError(f"rank-1 experts are retrieved here, not ones of width {shape.width}; use {REMEDY}")
        if self.heads < 1 or not 0 < self.k <= shape.experts:
            raise ValueError(f"heads={self.heads} and k={self.k} must lie between 1 and the {shape.experts} experts")
        return ("gather",) * shape.experts

    def max_k(self, shape: ModelShape) -> int:
        """Return the experts that a token has where no two queries find the same."""
        return min(self.heads * self.k, len(self.kinds(shape)))


REMEDY = f"axes.structure={Retrieval.structure}"


@dataclass(frozen=True)
class PEER(Retrieval):
    """PEER (He 2024, arXiv 2407.04153): each head adds the scores of two half-keys and weighs its k best by softmax.

    ``key_width`` is the width of half a key. The implementation that most people run (PEER-pytorch) weighs a head's one
    expert by ReLU of its score: ``score="relu"`` with ``k=1``. The paper's experts are act(v x) u without a gate and
    a million by number; here they are the layer's own neurons. Queries are not normalised by batch statistics.
    """

    heads: int = 8
    k: int = 16
    key_width: int = 128
    score: Literal["softmax", "relu"] = "softmax"

    def __post_init__(self) -> None:
        if self.key_width < 1:
            raise ValueError(f"key_width={self.key_width} must be at least 1")


@dataclass(frozen=True)
class UltraMem(Retrieval):
    """UltraMemV2 (arXiv 2411.12364): Tucker-decomposed keys find each head's k best, whose weights are raw scores.

    S1_i' C S2_j with a core C [``rank``, ``rank``] is the score of row (i, j), searched along the core's leading
    singular vectors (TDQKR); weights may be negative. Here there is one core, so that a row has one weight: the layer
    with more cores, and with the projections of its values, is ``moe.gather.ultramem.UltraMem``. Its gelu gate is an
    expert's own activation, since (W_pre x) P[row] is one row of the layer. Keys and queries are normalised by side,
    where the released code normalises whole ones. Call the router's ``update`` after a step that changes the core.
    """

    key_width: int = 512
    rank: int = 2

    def __post_init__(self) -> None:
        if self.key_width < 1 or self.rank < 1:
            raise ValueError(f"key_width={self.key_width} and rank={self.rank} must be at least 1")


DESCRIPTORS = [
    Descriptor("routing", "peer", "PEER: product keys over rank-1 experts", "moebench.moe.routers.gather:peer", PEER),
    Descriptor(
        "routing",
        "ultramem",
        "UltraMemV2: Tucker keys over rank-1 experts",
        "moebench.moe.routers.gather:ultramem",
        UltraMem,
        aliases=("ultramem_v2",),
    ),
]
