"""How much attention goes to a window's first token. Shape letters: B windows (1), N heads, T tokens, D head width."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...contracts import Check
from .base import close, holds


class Sinks:
    """Mean attention on token 0 by layer, over heads and the queries after it; filled while ``watching``."""

    def __init__(self, layers: int) -> None:
        self.sums = [0.0] * layers
        self.queries = [0] * layers
        self.checks: list[Check] = []
        self.value_TV: Tensor | None = None

    def mass(self) -> list[float]:
        """Return the mean mass of every layer."""
        return [total / max(1, queries) for total, queries in zip(self.sums, self.queries, strict=True)]

    def add(self, layer: int, module: Any, output: Any) -> None:
        """Take in one window's attention [1, N, T, T]; in the first window of layer 0 see that it is the model's."""
        out_BTH, weights = output[0], output[1][0]
        self.sums[layer] += float(weights[:, 1:, 0].double().mean(0).sum())
        first = self.queries[layer] == 0
        self.queries[layer] += weights.shape[1] - 1
        if first:
            rows = weights.double().sum(-1)
            ahead = float(weights.triu(1).abs().max())
            sound = bool((rows - 1).abs().max() < 1e-5) and ahead == 0
            self.checks.append(holds(sound, f"attention of layer {layer} is no causal distribution over keys"))
            if self.value_TV is not None:
                again_TH = recomposed(module, weights, self.value_TV)
                self.checks.append(close(again_TH, out_BTH[0], "attention from its weights"))
                self.value_TV = None


def recomposed(attention: Any, weights_NTT: Tensor, value_TV: Tensor) -> Tensor:
    """Return an attention's output [T, H] from its weights and the values, whose heads may be fewer."""
    heads, tokens, _ = weights_NTT.shape
    value_GTD = value_TV.view(tokens, -1, attention.head_dim).transpose(0, 1)
    value_NTD = value_GTD.repeat_interleave(heads // len(value_GTD), dim=0)
    out_TH: Tensor = attention.o_proj((weights_NTT @ value_NTD).transpose(0, 1).reshape(tokens, -1))
    return out_TH


@contextlib.contextmanager
def watching(model: Any, sinks: Sinks) -> Iterator[None]:
    """Compute attention in the plain way and give its weights to ``sinks`` until the block ends."""
    before = model.config._attn_implementation
    layers = model.model.layers
    attentions = [layer.self_attn for layer in layers]
    hooks = [
        attention.register_forward_hook(lambda m, i, output, layer=layer: sinks.add(layer, m, output))
        for layer, attention in enumerate(attentions)
    ]
    if hasattr(attentions[0], "v_proj") and not sinks.queries[0]:

        def catch(module: Any, inputs: Any, output: Tensor) -> None:
            if not sinks.queries[0]:
                sinks.value_TV = output[0]

        hooks.append(attentions[0].v_proj.register_forward_hook(catch))
    try:
        model.set_attn_implementation("eager")
        with torch.no_grad():
            yield
    finally:
        model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
