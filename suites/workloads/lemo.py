"""Workload ``lemo``: a training step with fewer tokens in each layer (LeMo / Jenga, ATC 2025), on a byte-level MoE
language model that is trained here.

Shape letters: B sequences, T tokens, N blocks, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..workload_plugins import Lemo
from . import byte_model, text_bytes, token_elimination, transformer
from .byte_model import ByteTask
from .elimination import Elimination
from .text_bytes import symbols, text_sha256, windows
from .token_elimination import oracle_scores
from .training import generator, schedule, trained
from .transformer import Block


class LemoWorkload(Elimination):
    """Elimination in a model of bytes."""

    lr = 1e-3

    def __init__(self, params: Lemo, seed: int) -> None:
        super().__init__(params, seed)
        self.own, self.width = params, params.hidden
        self.task = ByteTask(params, seed)
        self.model = self.task.model

    def train(self) -> float:
        """Train the model, not to its end, so that fine-tuning has something left to do."""
        settings = schedule(self.own.steps, 3e-3, self.seed)
        identity = {"name": "lemo", "params": self.own, "seed": self.seed, "text": text_sha256()}
        modules = (byte_model, text_bytes, token_elimination, transformer)
        return trained(self.task, settings, identity, modules)

    def texts(self, held_out: bool, count: int, *stream: str | int) -> Tensor:
        """Return windows at random places."""
        return windows(symbols(held_out), count, self.params.tokens + 1, generator(self.seed, "lemo", *stream))

    @torch.no_grad()
    def inputs(self, ids_BT: Tensor) -> list[Tensor]:
        """Return x_BTH before each layer but the last, nothing eliminated."""
        inputs: list[Tensor] = []
        x_BTH = self.model.embedded(ids_BT[:, :-1])
        for layer in self.model.layers[:-1]:
            inputs.append(x_BTH)
            x_BTH = layer(x_BTH, transformer.causal)
        return inputs

    def normed(self, layer: int, x_BTH: Tensor) -> Tensor:
        """Return what the layer's attention reads."""
        normed_BTH: Tensor = self._layer(layer).attention_norm(x_BTH)
        return normed_BTH

    def scores(self, layer: int, x_BTH: Tensor) -> Tensor:
        """Return what the layer's own attention says of its blocks."""
        return oracle_scores(self._layer(layer), x_BTH, self.params.block)

    def _layer(self, layer: int) -> Block:
        found = self.model.layers[layer]
        if not isinstance(found, Block):
            raise TypeError(f"layer {layer} is no Block")
        return found
