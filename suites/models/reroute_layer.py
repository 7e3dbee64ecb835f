"""One MoE block of a transformers model in our hands: its gate answers with our Routing, its experts stay.

Shape letters: T tokens of a call, H hidden, E expert ids, P experts without weights, K slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...backends.bridge import describe
from ...contracts import MoebenchError
from ...moe.fold import Fold
from ...moe.layer import LayerWeights
from ...moe.router import RouterBundle
from ...moe.routing import Routing
from ...moe.shapes import ModelShape

RouterFactory = Callable[[LayerWeights, ModelShape, int], RouterBundle]
"""What ``create()`` of a routing's descriptor returns."""

GATE_NAMES = ("gate", "router")
"""What transformers calls the router of an MoE block."""


class ReroutedLayer:
    """The router of a block, and what folded experts add to the output of the others.

    ``answers`` is the dtype of the weights that the block expects of its gate.
    """

    def __init__(
        self, model: nn.Module, index: int, experts: Any, factory: RouterFactory, shape: ModelShape, seed: int
    ) -> None:
        store, _ = describe(experts)
        self.index, self.experts = index, experts
        self.gate, self.answers = _gate(model, experts)
        bias_E = getattr(self.gate, "e_score_correction_bias", None)
        weights = LayerWeights(
            experts.gate_up_proj, experts.down_proj, self.gate.weight, bias_E, activation=store.activation
        )
        try:
            self.bundle = factory(weights, shape, seed)
        except ValueError as error:
            raise MoebenchError(f"layer {index} of this model cannot be routed so: {error}") from error
        self.bundle.router.to(experts.down_proj.device)
        self.store = replace(store, kinds=self.bundle.kinds, constants=self.bundle.constants)
        self.fold = Fold(self.store) if set(self.bundle.kinds) != {"ffn"} else None
        self._former: Any = None
        self._hooks: list[Any] = []
        self._route: Callable[[Tensor], Routing]
        self._folded: tuple[Tensor, Tensor] | None = None

    @property
    def on_our_backend(self) -> bool:
        """Whether the experts run on a backend of ours at this moment."""
        return str(self.experts.config._experts_implementation).startswith("moebench:")

    def enter(self, route: Callable[[Tensor], Routing]) -> None:
        """Let ``route`` answer in the gate's place."""
        self._route = route
        self._former = self.gate.__dict__.get("forward")
        self.gate.forward = self.answer
        self._hooks = [self.experts.register_forward_hook(self.add_folded)]
        if self.bundle.input_scale != 1.0:
            self._hooks.append(self.experts.register_forward_pre_hook(self.scale))

    def exit(self) -> None:
        """Put the gate back."""
        if self._former is None:
            del self.gate.forward
        else:
            self.gate.forward = self._former
        for hook in self._hooks:
            hook.remove()

    def answer(self, hidden_states: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return what the block expects of its gate: logits_TE, weights_TK, indices_TK."""
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing = self._route(x_TH)
        indices_TK, weights_TK = routing.padded()
        if self.fold is not None:
            split = self.fold.split((indices_TK, weights_TK), len(x_TH))
            indices_TK, weights_TK = split.inputs
            self._folded = (x_TH, split.other_TP)
        if not self.on_our_backend and bool((indices_TK == len(self.store.ffn_ids)).any()):
            raise MoebenchError(
                f"layer {self.index} has tokens with fewer experts than others, which only our backends run; "
                "give reroute a backend, such as 'grouped'."
            )
        return routing.logits_TE, weights_TK.to(self.answers), indices_TK

    def scale(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the experts' arguments with their input times the scheme's factor."""
        return (args[0] * self.bundle.input_scale, *args[1:])

    def add_folded(self, module: nn.Module, args: tuple[Any, ...], y_TH: Tensor) -> Tensor:
        """Return the experts' output with what folded experts give; the very tensor where none are."""
        if self.fold is None or self._folded is None:
            return y_TH
        (x_TH, other_TP), self._folded = self._folded, None
        return (y_TH + self.fold.contribution(x_TH, other_TP)).to(y_TH.dtype)


def _gate(model: nn.Module, experts: Any) -> tuple[Any, torch.dtype]:
    """Return the gate beside ``experts`` and the dtype of the weights that it answers with, by asking it once."""
    block = next(module for module in model.modules() if any(child is experts for child in module.children()))
    down = experts.down_proj
    for name in GATE_NAMES:
        gate: Any = getattr(block, name, None)
        if isinstance(getattr(gate, "weight", None), Tensor):
            with torch.no_grad():
                answer = gate(torch.zeros(1, down.shape[1], dtype=down.dtype, device=down.device))
            if isinstance(answer, tuple) and len(answer) == 3 and not answer[2].is_floating_point():
                return gate, answer[1].dtype
    raise MoebenchError(f"{type(block).__name__} has no gate that answers (logits, weights, indices) to take over.")
