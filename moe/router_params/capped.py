"""Parameters of top-k with a capacity: Switch, GShard and Z-code differ in which tokens a full expert turns away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...contracts import Descriptor
from ..shapes import ModelShape
from .dynamic import AnyNumber
from .ffn_only import SoftmaxTopK


@dataclass(frozen=True)
class Capped(AnyNumber):
    """Top-k with a capacity (Switch, arXiv 2101.03961): an expert takes at most ceil(``factor`` k T / E) tokens.

    ``policy`` says which: the first of the batch (``position``), the most probable (``probs``), or a random choice, the
    random token selection of Z-code M3 (``random``, arXiv 2109.10465). With ``first_choices`` all first choices are
    served before any second one, as in GShard. ``share`` gives the weight of a dropped entry to the kept ones of its
    token, as GShard's code in DeepSpeed does; without it a token that is dropped everywhere keeps its residual stream
    only. Weights are p, not renormalised before the capacity.
    """

    pipeline: ClassVar[bool] = True

    k: int = 1
    factor: float = 1.25
    policy: Literal["position", "probs", "random"] = "position"
    first_choices: bool = False
    share: bool = False

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise ValueError(f"factor={self.factor} leaves no places; give a positive one")

    @property
    def causal(self) -> bool:
        """Whether later tokens leave earlier ones alone."""
        return self.policy == "position" and not self.first_choices

    def kinds(self, shape: ModelShape) -> tuple[str, ...]:
        """Return ``ffn`` for every expert."""
        SoftmaxTopK(self.k).selection(shape)
        return super().kinds(shape)

    def max_k(self, shape: ModelShape) -> int:
        """Return k."""
        return self.k


DESCRIPTORS = [
    Descriptor(
        "routing",
        "capped",
        "top-k with a capacity: position, probs or random token selection",
        "moebench.moe.routers.capped:build",
        Capped,
    ),
]
