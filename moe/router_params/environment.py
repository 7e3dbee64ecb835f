"""Parameters of routers that decide for a whole environment or sequence. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...contracts import Descriptor
from .ffn_only import OneExpert


@dataclass(frozen=True)
class MixER(OneExpert):
    """MixER (arXiv 2502.05058): argmax of a linear map of the environment's context vector, weight 1.

    The map is no parameter: after each step it is fitted by least squares to clusters of the context vectors, matched
    to experts by their losses. ``features`` is the size of a context vector, of which ``ctx.features`` [S, D] holds one
    per segment id. The paper draws its first cluster centres at random; here they lie far apart, by no chance.
    """

    beyond_text: ClassVar[str] = "features"

    features: int = 16

    def __post_init__(self) -> None:
        if self.features < 1:
            raise ValueError(f"features={self.features} must be at least 1")


@dataclass(frozen=True)
class DMoERM(OneExpert):
    """DMoERM (arXiv 2403.01197), the outer layer: the last token of a sequence picks one expert for all of it.

    The paper's classifier is a language model that reads the prompt; here it is a linear map of the layer's input at
    the last token. The inner layer is a mixture of LoRA experts and no routing.
    """

    causal: ClassVar[bool] = False


DESCRIPTORS = [
    Descriptor(
        "routing",
        "mixer",
        "MixER: one expert per environment, by least squares",
        "moebench.moe.routers.environment:build_mixer",
        MixER,
    ),
    Descriptor(
        "routing",
        "dmoerm",
        "DMoERM: one expert per sequence",
        "moebench.moe.routers.environment:build_dmoerm",
        DMoERM,
    ),
]
