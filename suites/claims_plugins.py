"""Descriptor and parameters of suite ``routing_claims``. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..contracts import Descriptor, unknown
from .plugins import LayerSuite

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "topk": (
        "mixtral-renormalised",
        "moe-llava-upcycled",
        "switch-even",
        "gshard-priority",
        "gshard-second",
        "xmoe-length",
        "deepseek-bias",
        "deepseek-apart",
        "deepseek-groups",
    ),
    "load": (
        "expert-choice-load",
        "expert-choice-variable",
        "hash-free",
        "hash-balanced",
        "thor-uniform",
        "zcode-rts",
        "zcode-aoe",
    ),
    "null": ("adamoe-share", "adamoe-bucket", "moepp-capacity", "adamoe-vla-decoupled"),
    "dynamic": ("blockffn-cls", "remoe-continuous", "top-p-share", "top-p-harder"),
    "gates": (
        "evomoe-falls",
        "evomoe-one",
        "temperature-tied",
        "activation-frees",
        "activation-relu",
        "dselect-k-saturated",
        "dselect-k-start",
        "dselect-k-continuous",
        "comet-simplex",
        "comet-saturated",
    ),
    "context": (
        "got-clusters",
        "got-loose",
        "got-unstructured",
        "read-me-sliced",
        "read-me-plan",
        "m3vit-task",
        "moiie-apart",
        "mixer-refit",
    ),
    "experts": (
        "moex-firing",
        "moex-sparser",
        "moex-wide",
        "mofme-merged",
        "mofme-released",
        "pr-moe-parameters",
        "time-moe-active",
    ),
    "slices": ("uoe-dense", "uoe-attention", "mohd-dense", "bam-dense"),
    "memory": (
        "peer-exact",
        "peer-sublinear",
        "ultramem-positive",
        "ultramem-identity",
        "ultramem-start",
        "ultramem-bytes",
    ),
    "contrast": ("scmoe-greedy", "scmoe-weak"),
}
"""Names of the claims by the module of ``routing_claims`` that computes them."""

FAMILY_OF: Mapping[str, str] = {name: family for family, names in FAMILIES.items() for name in names}
ALL = "all"


@dataclass(frozen=True)
class RoutingClaims:
    """Claims of papers about routing that need no training: one case each, with metrics ``claim_a`` and ``claim_b``.

    ``claim`` is the name of one, or ``all``. The papers' rules between a and b are in ``suites/papers``.
    """

    claim: str = ALL

    AXES: ClassVar[Mapping[str, Any]] = LayerSuite.AXES

    def __post_init__(self) -> None:
        if self.claim != ALL and self.claim not in FAMILY_OF:
            raise ValueError(unknown("claim", self.claim, [ALL, *FAMILY_OF]))


DESCRIPTORS = [
    Descriptor(
        "suite",
        "routing_claims",
        "claims of papers about routing, without training",
        "moebench.suites.claims:create",
        RoutingClaims,
    ),
]
