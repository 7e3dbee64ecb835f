"""Parameters of gates whose temperature falls while they are trained. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...contracts import Descriptor
from ..schedules import Schedule
from .dynamic import AnyNumber


@dataclass(frozen=True)
class DenseToSparse(AnyNumber):
    """Dense-to-sparse gate (EvoMoE, arXiv 2112.14397): every expert with g > ``threshold``, g = softmax(z / tau).

    tau goes from ``start`` at progress 0 to ``end`` at progress ``until``, so that a token has all experts first and
    fewer and fewer later. From progress ``hard`` on it has its best one alone; with None that never comes, and with
    ``threshold`` 0 as well the gate is the dense softmax of the theory of temperature (arXiv 2401.13875). A token has
    no expert where more than 1 / threshold experts are all alike.

    ``weight`` is g, or the softmax without temperature. In training, with ``noise``, Gumbel noise is added to z before
    g is made. The released code takes the best expert with its softmax weight in every inference; here that is
    ``weight`` ``softmax`` at progress 1, where an inference stands by default.
    """

    pipeline: ClassVar[bool] = True

    start: float = 1.0
    end: float = 0.5
    decay: Literal["exponential", "linear"] = "exponential"
    until: float = 1.0
    threshold: float = 1e-3
    hard: float | None = 1.0
    weight: Literal["gate", "softmax"] = "gate"
    noise: bool = True

    def __post_init__(self) -> None:
        if min(self.start, self.end) <= 0:
            raise ValueError(f"temperatures start={self.start} and end={self.end} must be positive")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold={self.threshold} must lie in [0, 1)")
        if not 0 < self.until <= 1:
            raise ValueError(f"until={self.until} must lie in (0, 1]")

    @property
    def schedule(self) -> Schedule:
        """The temperature by progress."""
        return Schedule(self.start, self.end, self.decay, self.until)


@dataclass(frozen=True)
class ActivationGate(DenseToSparse):
    """Activation dense-to-sparse gate (arXiv 2401.13875): z = act(x W^T) + b, otherwise as dense-to-sparse.

    An activation with act(z) = z act'(z), as ``relu`` is, leaves temperature and weights tied by the equation that
    slows estimation down (du/dtau = -W du/dW / tau); the others break it. That b lies outside is our reading.
    """

    activation: Literal["sigmoid", "tanh", "gelu", "silu", "relu"] = "sigmoid"


BUILD = "moebench.moe.routers.temperature:build"

DESCRIPTORS = [
    Descriptor("routing", "dense_to_sparse", "temperature gate, all experts to one", BUILD, DenseToSparse),
    Descriptor("routing", "activation_gate", "activation before the temperature", BUILD, ActivationGate),
]
