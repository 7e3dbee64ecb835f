"""DiT-MoE on digits: a diffusion transformer whose FFNs are routed experts (arXiv 2407.11633), on 16 patches of 2x2.

Shape letters: B images, L patches, P pixels of a patch, H hidden, D pixels, S time steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..models import substream
from ..workload_plugins import DiTMoE
from .digits import CLASSES, SIDE, split
from .samplers import STEPS, signal_shares
from .training import generator
from .transformer import Attention, ExpertFFN, balance, full, routings

PATCH = 2
PATCHES = (SIDE // PATCH) ** 2


class DiTBlock(nn.Module):
    """Attention and experts, each scaled, shifted and gated by the condition; gates begin at zero."""

    def __init__(self, params: DiTMoE) -> None:
        super().__init__()
        hidden = params.hidden
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False)
        self.attention = Attention(hidden, params.heads)
        self.ffn = ExpertFFN(hidden, params.width, params.experts, params.k)
        self.modulation = nn.Linear(hidden, 6 * hidden)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x_BLH: Tensor, condition_BH: Tensor) -> Tensor:
        """Return x_BLH after the block."""
        parts = self.modulation(nnf.silu(condition_BH))[:, None].chunk(6, dim=-1)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = parts
        x_BLH = x_BLH + gate_a * self.attention(self.norm(x_BLH) * (1 + scale_a) + shift_a, full)
        y_BLH: Tensor = x_BLH + gate_f * self.ffn(self.norm(x_BLH) * (1 + scale_f) + shift_f)
        return y_BLH


class DiT(nn.Module):
    """Predicts the noise in a digit of a class at a time step."""

    def __init__(self, params: DiTMoE) -> None:
        super().__init__()
        hidden = params.hidden
        self.embed = nn.Linear(PATCH**2, hidden)
        self.place = nn.Parameter(torch.randn(PATCHES, hidden) * 0.1)
        self.kind = nn.Embedding(CLASSES, hidden)
        self.time = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.blocks = nn.ModuleList(DiTBlock(params) for _ in range(params.depth))
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, PATCH**2)

    def forward(self, x_BD: Tensor, time_B: Tensor, class_B: Tensor) -> Tensor:
        """Return the predicted noise_BD of 8x8 images laid out in rows."""
        x_BPL = nnf.unfold(x_BD.view(-1, 1, SIDE, SIDE), PATCH, stride=PATCH)
        x_BLH = self.embed(x_BPL.transpose(1, 2)) + self.place
        condition_BH = self.time(waves(time_B, x_BLH.shape[-1])) + self.kind(class_B)
        for block in self.blocks:
            x_BLH = block(x_BLH, condition_BH)
        noise_BPL = self.out(self.norm(x_BLH)).transpose(1, 2)
        return nnf.fold(noise_BPL, (SIDE, SIDE), PATCH, stride=PATCH).flatten(1)


def waves(time_B: Tensor, width: int) -> Tensor:
    """Return sines and cosines of time, [B, width]."""
    rate = torch.exp(-math.log(1e4) * torch.arange(width // 2) / (width // 2))
    angle = time_B[:, None] * rate
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def scaled(images: Tensor) -> Tensor:
    """Return images in [-1, 1] as rows of pixels, [B, D]."""
    return 2 * images.flatten(1) - 1


class NoiseTask:
    """Predict the noise that was put into digits."""

    def __init__(self, params: DiTMoE, seed: int) -> None:
        torch.manual_seed(substream(seed, "dit_moe", "weights"))
        self.model: DiT = DiT(params)
        self.params, self.seed = params, seed
        (self.images, self.classes), _ = split(seed)
        self.share_S = signal_shares()

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Return x_BD, noise_BD, time_B and class_B."""
        rng = generator(self.seed, "dit_moe", "batch", step)
        chosen = torch.randint(len(self.images), (self.params.batch,), generator=rng)
        time_B = torch.randint(STEPS, (self.params.batch,), generator=rng)
        image_BD = scaled(self.images[chosen])
        noise_BD = torch.randn(image_BD.shape, generator=rng)
        share_B1 = self.share_S[time_B][:, None]
        return share_B1.sqrt() * image_BD + (1 - share_B1).sqrt() * noise_BD, noise_BD, time_B, self.classes[chosen]

    def loss(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the mean squared error plus balance."""
        x_BD, noise_BD, time_B, class_B = batch
        loss = nnf.mse_loss(self.model(x_BD, time_B, class_B), noise_BD)
        return loss + balance(routings(self.model)), {"loss": loss}

    def evaluate(self) -> Mapping[str, float]:
        """Nothing is watched while it trains."""
        return {}
