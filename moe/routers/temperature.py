"""Gates whose temperature falls while they are trained: EvoMoE's dense-to-sparse gate and the activation gate.

Shape letters: T tokens, H hidden, E expert ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..router import Linear, Router, RouterBundle, router_rows
from ..router_context import needed
from ..router_params.temperature import ActivationGate
from ..router_parts import gumbel_noise, masked_routing
from ..routing import Context, Routing

if TYPE_CHECKING:
    from ..layer import LayerWeights
    from ..router_params.temperature import DenseToSparse
    from ..shapes import ModelShape

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": nnf.gelu,
    "silu": nnf.silu,
    "relu": torch.relu,
}
"""What the activation gate may put between its linear map and the softmax."""


class Activated(nn.Module):
    """z = act(x W^T) + b, in the dtype of the linear scorer (activation gate, arXiv 2401.13875)."""

    def __init__(self, scorer: Linear, activation: Callable[[Tensor], Tensor], bias_E: Tensor) -> None:
        super().__init__()
        self.scorer = scorer
        self.activation = activation
        self.bias_E = nn.Parameter(bias_E.detach().clone())

    def forward(self, x_TH: Tensor, ctx: Context) -> Tensor:
        """Return logits_TE."""
        return self.activation(self.scorer(x_TH, ctx)) + self.bias_E


class TemperatureGate(Router):
    """Every expert with g > threshold, g = softmax((z + noise) / tau), and late in training the best one alone.

    The Routing's logits are z, its probabilities g. ``rule`` has the schedule and all else that is chosen.
    """

    needs = frozenset({"progress", "rng"})

    def __init__(self, scorer: nn.Module, rule: DenseToSparse) -> None:
        super().__init__()
        self.scorer = scorer
        self.rule = rule

    def forward(self, x_TH: Tensor, ctx: Context) -> Routing:
        """Return the Routing of ``x_TH``."""
        logits_TE: Tensor = self.scorer(x_TH, ctx)
        noisy_TE = logits_TE
        if self.rule.noise and ctx.training:
            noisy_TE = logits_TE + gumbel_noise(logits_TE, needed(ctx, "rng"))
        gate_TE = (noisy_TE / self.rule.schedule.at(ctx.progress)).softmax(-1)
        weight_TE = gate_TE if self.rule.weight == "gate" else logits_TE.softmax(-1)
        return masked_routing(weight_TE, self._active(gate_TE.detach(), ctx.progress), ctx, logits_TE, gate_TE)

    def _active(self, gate_TE: Tensor, progress: float) -> Tensor:
        """Return active_TE bool."""
        if self.rule.hard is None or progress < self.rule.hard:
            return gate_TE > self.rule.threshold
        best_T1 = gate_TE.argmax(-1, keepdim=True)
        return torch.zeros_like(gate_TE, dtype=torch.bool).scatter(1, best_T1, True)


def build(params: DenseToSparse) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory of the gate; its bias starts at zero."""

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        rows_EH, bias_E = router_rows(weights, shape, seed), torch.zeros(shape.experts)
        scorer: nn.Module = Linear(rows_EH, bias_E)
        if isinstance(params, ActivationGate):
            scorer = Activated(Linear(rows_EH), ACTIVATIONS[params.activation], bias_E)
        return RouterBundle(TemperatureGate(scorer, params), params.kinds(shape))

    return factory
