"""Two small ReLU classifiers of 8 x 8 digits whose hidden activations can be kept to the largest.

Shape letters: B images, P patches, D model width, F hidden width, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ...moe.probes.lazy import largest

CLASSES = 10
MODEL = 32
"""Width of the residual stream of both models."""

PATCH, PIXELS = 4, 16
"""A patch is one of four rows of 16 pixels."""


class LazyFFN(nn.Module):
    """x + W_2 h, h the ``active`` largest (None: all) of ReLU(W_1 norm(x)); ``hidden`` is the last call's h."""

    def __init__(self, width: int, active: int | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(MODEL)
        self.up, self.down = nn.Linear(MODEL, width), nn.Linear(width, MODEL)
        self.active = active
        self.hidden = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """Return [.., D]."""
        hidden = nnf.relu(self.up(self.norm(x)))
        self.hidden = hidden if self.active is None else largest(hidden, self.active)
        out: Tensor = x + self.down(self.hidden)
        return out


class LazyModel(nn.Module):
    """A classifier of ``depth`` FFNs of ``width``; as a transformer each follows an attention over four patches."""

    def __init__(self, shape: str, width: int, depth: int, active: int | None) -> None:
        super().__init__()
        self.patches = PATCH if shape == "transformer" else 1
        self.embed = nn.Linear(PIXELS * PATCH // self.patches, MODEL)
        self.place_PD = nn.Parameter(0.1 * torch.randn(self.patches, MODEL))
        attention: dict[str, Any] = {"num_heads": 2, "batch_first": True}
        self.mixers = nn.ModuleList(
            nn.MultiheadAttention(MODEL, **attention) for _ in range(depth if self.patches > 1 else 0)
        )
        self.ffns = nn.ModuleList(LazyFFN(width, active) for _ in range(depth))
        self.head = nn.Linear(MODEL, CLASSES)

    def forward(self, images_BX: Tensor) -> Tensor:
        """Return logits [B, C] of images of 64 pixels."""
        x_BPD = self.embed(images_BX.view(len(images_BX), self.patches, -1)) + self.place_PD
        for index, ffn in enumerate(self.ffns):
            if self.patches > 1:
                x_BPD = x_BPD + self.mixers[index](x_BPD, x_BPD, x_BPD, need_weights=False)[0]
            x_BPD = ffn(x_BPD)
        logits_BC: Tensor = self.head(x_BPD.mean(1))
        return logits_BC
