"""A CNN each of whose convolutions has E banks of filters, one of which is chosen for an image (arXiv 2308.10110).

Shape letters: B images, L layers with banks, E banks, C and O channels, Y and X pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

CHANNELS = (1, 16, 32, 32)
STRIDES = (1, 2, 1)
CLASSES = 10


class MoeCnn(nn.Module):
    """Three convolutions with ``experts`` banks each, and a router that chooses one bank a layer from the image."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.experts = experts
        pairs = pairwise(CHANNELS)
        self.banks = nn.ParameterList(
            nn.Parameter(torch.randn(experts, out, into, 3, 3) * (2 / (9 * into)) ** 0.5) for into, out in pairs
        )
        self.head = nn.Linear(CHANNELS[-1], CLASSES)
        self.router = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 4 * 4, len(self.banks) * experts),
        )

    def route(self, image_B1YX: Tensor) -> Tensor:
        """Return the router's logits [B, L, E]."""
        logits: Tensor = self.router(image_B1YX)
        return logits.view(len(logits), len(self.banks), self.experts)

    def forward(self, image_B1YX: Tensor, logits_BLE: Tensor | None = None) -> Tensor:
        """Return logits [B, K]; the choice of the largest logit passes gradients on as its softmax would."""
        logits_BLE = self.route(image_B1YX) if logits_BLE is None else logits_BLE
        probs_BLE = logits_BLE.softmax(-1)
        chosen_BLE = nnf.one_hot(logits_BLE.argmax(-1), self.experts).to(probs_BLE.dtype)
        gate_BLE = chosen_BLE + probs_BLE - probs_BLE.detach()
        hidden = image_B1YX
        for layer, (bank, stride) in enumerate(zip(self.banks, STRIDES, strict=True)):
            out = nnf.conv2d(hidden, bank.flatten(0, 1), stride=stride, padding=1)
            out_BECYX = out.view(len(out), self.experts, -1, *out.shape[2:])
            hidden = (out_BECYX * gate_BLE[:, layer, :, None, None, None]).sum(1).relu()
        return self.head(hidden.mean((2, 3)))  # type: ignore[no-any-return]  # nn.Module's call has no type

    def expert_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the banks and the classifier."""
        yield from self.banks
        yield from self.head.parameters()

    @torch.no_grad()
    def chosen_alone(self, image_B1YX: Tensor) -> Tensor:
        """Return what ``forward`` gives in float64, each image through its chosen banks alone: the oracle."""
        chosen_BL = self.route(image_B1YX).argmax(-1).tolist()
        rows = []
        for image_1YX, banks in zip(image_B1YX.double(), chosen_BL, strict=True):
            hidden = image_1YX[None]
            for bank, stride, expert in zip(self.banks, STRIDES, banks, strict=True):
                hidden = nnf.conv2d(hidden, bank[expert].double(), stride=stride, padding=1).relu()
            rows.append(nnf.linear(hidden.mean((2, 3)), self.head.weight.double(), self.head.bias.double()))
        return torch.cat(rows)
