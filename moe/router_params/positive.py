"""Parameters of routers that take every expert with a positive score: BlockFFN and ReMoE. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...contracts import Descriptor
from .dynamic import AnyNumber


@dataclass(frozen=True)
class BlockFFN(AnyNumber):
    """BlockFFN (arXiv 2507.08771): every expert with z > 0, weighted by RMSNorm(ReLU(z)) with a learned gain.

    ``epsilon`` is added to the mean square. Half of the experts are active at the start; losses ``cls`` and
    ``locality`` make them few. The paper's experts are two-layer SiLU FFNs without a gate.
    """

    pipeline: ClassVar[bool] = True

    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        if self.epsilon <= 0:
            raise ValueError(f"epsilon={self.epsilon} must be positive, or a token without experts divides by zero")


@dataclass(frozen=True)
class ReMoE(AnyNumber):
    """ReMoE (arXiv 2412.14711): every expert with z > 0, weighted by ReLU(z).

    Half of the experts are active at the start; loss ``l1``, whose coefficient ``controllers.lambda_step`` moves,
    brings them down to k.
    """

    pipeline: ClassVar[bool] = True


DESCRIPTORS = [
    Descriptor(
        "routing", "blockffn", "BlockFFN: RMSNorm of ReLU", "moebench.moe.routers.positive:build_blockffn", BlockFFN
    ),
    Descriptor("routing", "remoe", "ReMoE: ReLU of the logits", "moebench.moe.routers.positive:build_remoe", ReMoE),
]
