"""Parameters of gates made of smooth steps: DSelect-k and COMET. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...contracts import Descriptor
from ..shapes import ModelShape
from .dynamic import AnyNumber


@dataclass(frozen=True)
class SmoothStepGate(AnyNumber):
    """``k`` parts, each of which chooses one expert once its smooth steps are saturated, and several before.

    ``gamma`` is the width of a step's slope. Weights and biases of steps start as U(-``init`` gamma, ``init`` gamma):
    at the published 0.01 every step is on its slope and a token has all experts; a large ``init`` saturates them.

    ``permutation`` learns which expert is called what: one permutation for all parts, or one ``per_part``. It is
    searched for in training at a progress below ``search`` and fixed from then on.
    """

    k: int = 2
    gamma: float = 1.0
    init: float = 0.01
    permutation: Literal["none", "shared", "per_part"] = "none"
    search: float = 0.05

    def __post_init__(self) -> None:
        if self.gamma <= 0 or self.init <= 0:
            raise ValueError(f"gamma={self.gamma} and init={self.init} must be positive")
        if not 0 < self.search <= 1:
            raise ValueError(f"search={self.search} must lie in (0, 1]")

    def kinds(self, shape: ModelShape) -> tuple[str, ...]:
        """Return ``ffn`` for every expert."""
        if not 0 < self.k <= shape.experts or shape.experts < 2:
            raise ValueError(f"k={self.k} must lie between 1 and the layer's {shape.experts} experts, two at least")
        return super().kinds(shape)


@dataclass(frozen=True)
class DSelectK(SmoothStepGate):
    """DSelect-k (arXiv 2106.03760): a softmax mix of ``k`` selectors, each a product of smooth steps over binary codes.

    With 2^m experts weights sum to one; with another number they may sum to less, as codes without an expert take
    their part (``unreachable`` is the paper's penalty). k is the number of experts at saturation alone.
    """


@dataclass(frozen=True)
class Comet(SmoothStepGate):
    """COMET (arXiv 2306.02824): one softmax over the leaves of ``k`` binary trees, whose leaves are the experts.

    A leaf scores a linear map plus the logarithm of the probability of its path, -inf where that is 0; 1e-8 is added
    before the logarithm, as released, so that its slope is finite. Trees are heaps, so that any number of experts will
    do. With ``permutation`` it is COMET+, whose published search took 1 to 10 % of an epoch. Published ``gamma`` is 10
    on MovieLens. The released code rounds the last soft permutation, here its logits are; and the top-k gate that it is
    compared with there loses a chosen logit that is exactly 0.
    """

    gamma: float = 10.0


DESCRIPTORS = [
    Descriptor(
        "routing",
        "dselect_k",
        "DSelect-k: binary codes of smooth steps",
        "moebench.moe.routers.smoothstep:build_dselect_k",
        DSelectK,
        aliases=("dselect-k",),
    ),
    Descriptor("routing", "comet", "COMET: smooth-step trees", "moebench.moe.routers.smoothstep:build_comet", Comet),
]
