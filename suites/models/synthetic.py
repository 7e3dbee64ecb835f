"""Models of random weights in a published shape; each layer is made when it is asked for, from the seed alone.

Shape letters: E experts, F expert width, S width of the shared expert, H hidden.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...contracts import MoebenchError
from ...moe.layer import LayerWeights, SharedExpert
from ...moe.shapes import ModelShape
from ..model_plugins import Synthetic
from . import Split, substream


class SyntheticModel:
    """A ModelSource of normal weights, float32, standard deviation ``std`` / sqrt(fan-in)."""

    def __init__(self, params: Synthetic) -> None:
        self.params = params
        self.shape: ModelShape = params.shape()

    def layer(self, index: int) -> LayerWeights:
        """Return experts [E, 2F or F, H] and [E, H, F], the router [E, H], and the shared expert where there is one."""
        if index not in self.shape.moe_layers:
            raise MoebenchError(f"layer {index} holds no experts; choose among {list(self.shape.moe_layers)}.")
        shape, own = self.shape, self.params.architecture
        rows = 2 * shape.width if shape.gated else shape.width
        bias = self._normal(index, "bias", (shape.experts,), 10_000) if own.selection.bias else None
        return LayerWeights(
            self._normal(index, "gate_up", (shape.experts, rows, shape.hidden), shape.hidden),
            self._normal(index, "down", (shape.experts, shape.hidden, shape.width), shape.width),
            self._normal(index, "router", (shape.experts, shape.hidden), shape.hidden),
            bias,
            self._shared(index),
            shape.activation,
            shape.gated,
        )

    def hidden_states(self, index: int, split: Split, tokens: int, seed: int) -> Tensor:
        """Raise: random weights have no text behind them."""
        raise MoebenchError("a synthetic model has no recorded hidden states; use traffic=gaussian or model=smollm2.")

    def _shared(self, index: int) -> SharedExpert | None:
        width, hidden = self.shape.shared_width, self.shape.hidden
        if not width:
            return None
        gate_H = self._normal(index, "shared_gate", (hidden,), hidden) if self.params.architecture.shared_gate else None
        return SharedExpert(
            self._normal(index, "shared_gate_up", (2 * width, hidden), hidden),
            self._normal(index, "shared_down", (hidden, width), width),
            gate_H,
            self.shape.activation,
        )

    def _normal(self, index: int, name: str, size: tuple[int, ...], fan_in: int) -> Tensor:
        """Return a tensor of its own stream: changing one size leaves the other tensors as they were."""
        rng = torch.Generator().manual_seed(substream(self.params.seed, "model", index, name))
        return torch.randn(size, generator=rng).mul_(self.params.std / math.sqrt(fan_in))


def build(params: Synthetic) -> SyntheticModel:
    """Return the model; nothing is allocated before a layer is asked for."""
    return SyntheticModel(params)
