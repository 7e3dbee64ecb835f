"""A causal MoE language model over single bytes, whose layers may leave tokens out.

Shape letters: B sequences, T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..models import substream
from ..workload_plugins import Lemo
from .text_bytes import SYMBOLS, symbols, windows
from .token_elimination import Choose, segment_loss, through
from .training import generator
from .transformer import Block, balance, routings


class ByteModel(nn.Module):
    """A causal MoE language model over single bytes."""

    def __init__(self, params: Lemo) -> None:
        super().__init__()
        hidden = params.hidden
        self.embed = nn.Embedding(SYMBOLS, hidden)
        self.place = nn.Embedding(params.tokens, hidden)
        self.layers = nn.ModuleList(
            Block(hidden, params.heads, params.width, params.experts, params.k) for _ in range(params.depth)
        )
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.head = nn.Linear(hidden, SYMBOLS, bias=False)

    def embedded(self, ids_BT: Tensor) -> Tensor:
        """Return the residual stream before the first layer."""
        x_BTH: Tensor = self.embed(ids_BT) + self.place.weight[: ids_BT.shape[1]]
        return x_BTH

    def loss(self, ids_BT: Tensor, block: int, choose: Choose | None = None, segments: int = 0) -> Tensor:
        """Return the mean cross-entropy of the next byte, in nats."""
        x_BTH = self.norm(through(self.layers, self.embedded(ids_BT[:, :-1]), block, choose))
        return segment_loss(x_BTH.flatten(0, 1), self.head.weight, ids_BT[:, 1:].flatten(), segments)


class ByteTask:
    """Next-byte prediction on windows of the calibration half."""

    def __init__(self, params: Lemo, seed: int) -> None:
        torch.manual_seed(substream(seed, "lemo", "weights"))
        self.model: ByteModel = ByteModel(params)
        self.params, self.seed = params, seed

    def batch(self, step: int) -> Tensor:
        """Return ids_BT [1, T + 1]."""
        return windows(symbols(False), 1, self.params.tokens + 1, generator(self.seed, "lemo", "batch", step))

    def loss(self, batch: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return cross-entropy plus balance."""
        loss = self.model.loss(batch, self.params.block)
        return loss + balance(routings(self.model)), {"loss": loss}

    def evaluate(self) -> Mapping[str, float]:
        """Nothing is watched while it trains."""
        return {}
