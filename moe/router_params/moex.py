"""Parameters of MoE-X. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...contracts import Descriptor
from .ffn_only import SoftmaxTopK


@dataclass(frozen=True)
class MoEX(SoftmaxTopK):
    """MoE-X (arXiv 2503.07639): the experts that will fire least for a token, estimated from their own weights.

    With weights taken as Gaussian per input channel, z_e = -erf(mu_e(x) / (sqrt(2) sigma_e(x))); top-2 of softmax,
    renormalised. The router has no weights. That k is 2 and that the softmax is over these scores is our reading.
    """

    renormalize: ClassVar[bool] = True


DESCRIPTORS = [
    Descriptor(
        "routing",
        "moex",
        "MoE-X: the sparsest experts, from their weights",
        "moebench.moe.routers.moex:build",
        MoEX,
        aliases=("moe-x",),
    ),
]
