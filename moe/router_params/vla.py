"""Parameters of AdaMoE-VLA's scale adapter. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...contracts import Descriptor, Selection
from ..shapes import ModelShape
from .shared import SharedRule


@dataclass(frozen=True)
class AdaMoEVLA:
    """AdaMoE-VLA (arXiv 2510.14300): top-k of p = softmax(z); the weight is p + x W_s, which may be negative.

    The adapter W_s decides how much an expert says, the router who speaks: a balance loss does not reach W_s.
    ``adapter`` ``add`` is that; ``concat`` (CSMoE, the paper's other design) has weight softmax([x; p] W_cs).
    ``std`` is the standard deviation of what the adapter adds at the start, for x of unit variance: 1 in the released
    code; with ``add`` and 0 the router is plain top-k, not renormalised. The paper's shared
    experts hold the dense FFN that the routed ones are copies of at the start; here there is one.

    The released code without an adapter looks up the k weights by expert id, the wrong axis; for top-k without an
    adapter use routing ``olmoe`` and its k.
    """

    pipeline: ClassVar[bool] = True

    k: int = 1
    adapter: Literal["add", "concat"] = "add"
    std: float = 1.0

    def __post_init__(self) -> None:
        if self.std < 0:
            raise ValueError(f"std={self.std} must not be negative")

    @property
    def shared(self) -> SharedRule:
        """One shared expert, as wide as a routed one, ungated."""
        return SharedRule(1.0)

    def selection(self, shape: ModelShape) -> Selection | None:
        """Return None: the adapter is no part of a fused kernel's weights."""
        return None

    def kinds(self, shape: ModelShape) -> tuple[str, ...]:
        """Return ``ffn`` for every expert."""
        if not 0 < self.k <= shape.experts:
            raise ValueError(f"k={self.k} must lie between 1 and the layer's {shape.experts} experts")
        return ("ffn",) * shape.experts

    def max_k(self, shape: ModelShape) -> int:
        """Return k."""
        return self.k


DESCRIPTORS = [
    Descriptor("routing", "adamoe_vla", "AdaMoE-VLA scale adapter", "moebench.moe.routers.vla:build", AdaMoEVLA),
]
