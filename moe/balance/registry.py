"""The losses by name, and their weighted sum: what a layer's training configuration lists."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...contracts import unknown
from ..routing import Context, Routing
from .load import cv2_importance, cv2_load, entropy, modality, sequence, switch, z_loss
from .modality import modality_kl, modality_l1
from .sparse import chunk_sparsity, l1, locality


@dataclass(frozen=True)
class Loss:
    """A loss ``function(routing, ctx, **parameters) -> scalar``, not yet multiplied by a coefficient.

    ``source`` is the paper; ``even`` the value where every token is equally likely to have every expert and the load
    is even, None where that depends on the parameters.
    """

    function: Callable[..., Tensor]
    source: str
    even: float | None = None

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of what the function takes besides the Routing and the Context."""
        return tuple(inspect.signature(self.function).parameters)[2:]


LOSSES: Mapping[str, Loss] = {
    "switch": Loss(switch, "Fedus et al. 2021; eta: arXiv 2410.07348; bucket: AdaMoE 2024; first: GShard 2020", 1.0),
    "modality": Loss(modality, "MoIIE 2025", 1.0),
    "modality_l1": Loss(modality_l1, "Uni-MoE, arXiv 2405.11273"),
    "modality_kl": Loss(modality_kl, "Uni-MoE, arXiv 2405.11273", 1.0),
    "sequence": Loss(sequence, "DeepSeek-V3, arXiv 2412.19437", 1.0),
    "cv2_importance": Loss(cv2_importance, "Shazeer et al. 2017, arXiv 1701.06538", 0.0),
    "cv2_load": Loss(cv2_load, "Shazeer et al. 2017, arXiv 1701.06538", 0.0),
    "entropy": Loss(entropy, "Huang et al. 2024, arXiv 2403.07652", 1.0),
    "z": Loss(z_loss, "ST-MoE, arXiv 2202.08906"),
    "cls": Loss(chunk_sparsity, "BlockFFN, arXiv 2507.08771"),
    "locality": Loss(locality, "BlockFFN, arXiv 2507.08771"),
    "l1": Loss(l1, "ReMoE, arXiv 2412.14711"),
}
"""Every loss by name."""


@dataclass(frozen=True)
class Term:
    """One summand of a training loss: ``coefficient`` times the loss called ``name`` with ``parameters``."""

    name: str
    coefficient: float
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in LOSSES:
            raise ValueError(unknown("loss", self.name, LOSSES))
        known = LOSSES[self.name].parameters
        for parameter in self.parameters:
            if parameter not in known:
                raise ValueError(unknown(f"parameter of loss '{self.name}'", parameter, known))


def total(routing: Routing, ctx: Context | None, terms: Sequence[Term]) -> Tensor:
    """Return the sum of ``terms``, a scalar; zero where there are none."""
    values = (term.coefficient * LOSSES[term.name].function(routing, ctx, **term.parameters) for term in terms)
    return sum(values, start=routing.weight_N.new_zeros(()))
