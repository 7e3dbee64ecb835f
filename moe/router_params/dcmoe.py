"""Parameters of dynamic-capacity routing: top-p, null experts and experts that are always on. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ...contracts import Descriptor
from ..shapes import ModelShape
from .dynamic import AnyNumber


@dataclass(frozen=True)
class DCMoE(AnyNumber):
    """DCMoE (Uni-MoE, arXiv 2510.13344): the fewest dynamic experts that hold ``p``, and ``fixed`` ones, one softmax.

    The layer's last ``fixed`` experts are always on. The others and ``null`` zero experts compete: the fewest of them
    whose softmax adds up to at least ``p`` are taken. A weight is the softmax over what is taken, fixed ones included;
    that of a null expert is lost, so that weights sum to less than one where one was taken.

    The released code first renormalises the dynamic experts among themselves and then gives them their part of that
    softmax, which comes to the same where their weights are softmax, as here. There (``released_weights``) they are a
    SparseMixer's: each in turn has the softmax over itself and what scores within 2 % of it, which is 1 for most, so
    that the dynamic experts of a token weigh much the same. Its estimator of the gradient is written there and not
    used. Capacity (policy ``probs`` or ``position``) is off there by default; ``with_capacity`` adds it.
    """

    pipeline: ClassVar[bool] = True

    p: float = 0.7
    null: int = 1
    fixed: int = 2
    released_weights: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"p={self.p} must lie in (0, 1]")
        if self.null < 0 or self.fixed < 0:
            raise ValueError(f"null={self.null} and fixed={self.fixed} must not be negative")

    def kinds(self, shape: ModelShape) -> tuple[str, ...]:
        """Return the dynamic experts, the fixed ones, and the null ones, which are zero experts."""
        if self.fixed >= shape.experts:
            raise ValueError(
                f"fixed={self.fixed} must leave some of the layer's {shape.experts} experts to choose from"
            )
        return super().kinds(shape) + ("zero",) * self.null

    def max_k(self, shape: ModelShape) -> int:
        """Return the fixed experts and ceil(p (n + m)) of n dynamic and m null ones, but no more than n."""
        dynamic = shape.experts - self.fixed
        return self.fixed + min(math.ceil(self.p * (dynamic + self.null)), dynamic)


DESCRIPTORS = [
    Descriptor(
        "routing", "dcmoe", "DCMoE: top-p, a null expert, fixed ones", "moebench.moe.routers.dcmoe:build", DCMoE
    ),
]
