"""Workload ``colormae``: a masked autoencoder with experts whose masks are cut from noise of one colour (ColorMAE).

Digits are doubled to 16x16 pixels in patches of 2x2. Shape letters: B images, L patches, V visible patches, P pixels of
a patch, H hidden, C classes, E experts.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...contracts import Metric, Series
from ...moe.metrics import load_metrics
from ..digits import digits_sha256
from ..models import substream
from ..workload_plugins import COLOURS, ColorMAE
from . import digits, noise, transformer
from .base import Identity, Report, checked
from .digits import CLASSES, SIDE, split
from .noise import ColourMask, bank, lonely_share, spectral_gap
from .training import generator, schedule, trained
from .transformer import Block, balance, full, routings

PATCH, PATCHES = 2, SIDE
"""Pixels of a patch's side, and patches of an image's side: 2 x 8 are the 16 pixels of a doubled digit."""

JUDGED = 256
"""Patterns whose mean spectrum is judged: with so many, white is even within a few percent at every radius."""


def patches(images: Tensor) -> Tensor:
    """Return the patches of 8x8 images doubled to 16x16, [B, L, P]: each pixel with its bilinear neighbours."""
    large = nn.functional.interpolate(images[:, None], scale_factor=2, mode="bilinear", align_corners=False)
    return nn.functional.unfold(large, PATCH, stride=PATCH).transpose(1, 2)


class MaskedAutoencoder(nn.Module):
    """An encoder of visible patches with experts, and a decoder that fills in the others."""

    def __init__(self, params: ColorMAE) -> None:
        super().__init__()
        hidden, count = params.hidden, PATCHES**2
        self.embed = nn.Linear(PATCH**2, hidden)
        self.place = nn.Parameter(torch.randn(count, hidden) * 0.1)
        self.mask = nn.Parameter(torch.zeros(hidden))
        self.encoder = nn.ModuleList(
            Block(hidden, params.heads, params.width, params.experts, params.k) for _ in range(params.depth)
        )
        self.decoder = Block(hidden, params.heads, params.width, 1, 1)
        self.out = nn.Linear(hidden, PATCH**2)

    def encoded(self, pixels_BLP: Tensor, visible_BV: Tensor) -> Tensor:
        """Return x_BVH of the visible patches."""
        x_BLH: Tensor = self.embed(pixels_BLP) + self.place
        x_BVH = x_BLH.gather(1, visible_BV[..., None].expand(-1, -1, x_BLH.shape[-1]))
        for block in self.encoder:
            x_BVH = block(x_BVH, full)
        return x_BVH

    def forward(self, pixels_BLP: Tensor, visible_BV: Tensor) -> Tensor:
        """Return the mean squared error of the hidden patches."""
        x_BVH = self.encoded(pixels_BLP, visible_BV)
        index = visible_BV[..., None].expand(-1, -1, x_BVH.shape[-1])
        all_BLH = (self.mask + self.place).expand(len(x_BVH), -1, -1).scatter(1, index, x_BVH)
        error_BL = (self.out(self.decoder(all_BLH, full)) - pixels_BLP).square().mean(-1)
        hidden_BL = torch.ones_like(error_BL).scatter(1, visible_BV, 0.0)
        loss: Tensor = (error_BL * hidden_BL).sum() / hidden_BL.sum()
        return loss


class MaskedTask:
    """Reconstruction behind masks of one colour."""

    def __init__(self, params: ColorMAE, colour: str, seed: int) -> None:
        torch.manual_seed(substream(seed, "colormae", "weights"))  # the same weights for every colour
        self.model: MaskedAutoencoder = MaskedAutoencoder(params)
        visible = round(PATCHES**2 * (1 - params.masked))
        self.seed = seed
        self.visible = ColourMask(colour, params.patterns, PATCHES, visible, substream(seed, "colormae", "masks"))
        self.images = split(seed)[0][0]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return pixels_BLP of 64 images and their visible_BV."""
        chosen = torch.randint(len(self.images), (64,), generator=generator(self.seed, "colormae", "batch", step))
        images = self.images[chosen]
        return patches(images), self.visible(images, step)

    def loss(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return reconstruction error plus balance."""
        loss = self.model(*batch)
        return loss + balance(routings(self.model.encoder)), {"loss": loss}

    def evaluate(self) -> Mapping[str, float]:
        """Nothing is watched while it trains."""
        return {}


class ColorMAEWorkload:
    """One autoencoder for each colour, alike in all but their masks."""

    def __init__(self, params: ColorMAE, seed: int) -> None:
        self.params, self.seed = params, seed
        self.tasks = {colour: MaskedTask(params, colour, seed) for colour in params.colours}
        self.training, self.held_out = split(seed)

    def train(self) -> float:
        """Train every colour."""
        settings = schedule(self.params.steps, 2e-3, self.seed)
        modules = (sys.modules[__name__], digits, noise, transformer)
        losses = []
        for colour, task in self.tasks.items():
            identity = {"name": "colormae", "params": self.params, "colour": colour, "seed": self.seed}
            identity["digits"] = digits_sha256()
            losses.append(trained(task, settings, identity, modules))
        return max(losses)

    @torch.no_grad()
    def measure(self) -> Report:
        """Return for each colour the error behind its own and behind white masks, a linear probe, and expert load."""
        metrics: list[Metric] = []
        series: list[Series] = []
        common = self._mask("white")
        images = self.held_out[0]
        for colour, task in self.tasks.items():
            own_BV, common_BV = task.visible(images, "judged"), common(images, "judged")
            metrics += [
                Metric(f"mse_{colour}", float(task.model(patches(images), own_BV)), "1", n=len(images)),
                Metric(f"mse_white_masks_{colour}", float(task.model(patches(images), common_BV)), "1", n=len(images)),
                Metric(f"probe_{colour}", self._probe(task.model), "1", n=len(images)),
                Metric(f"lonely_{colour}", lonely_share(own_BV, PATCHES), "1"),
            ]
            load, cv = self._load(task.model, own_BV)
            metrics.append(Metric(f"load_cv_{colour}", cv, "1"))
            series += [Series(f"load_{colour}", tuple(one.tolist()), "tokens", layer) for layer, one in enumerate(load)]
        return Report(checked(self._identities()), tuple(metrics), tuple(series))

    def _mask(self, colour: str) -> ColourMask:
        visible = round(PATCHES**2 * (1 - self.params.masked))
        return ColourMask(colour, self.params.patterns, PATCHES, visible, substream(self.seed, "colormae", "masks"))

    def _probe(self, model: MaskedAutoencoder) -> float:
        """Return the held-out accuracy of ridge regression of the classes on mean features of whole images."""
        everything = torch.arange(PATCHES**2)

        def features(images: Tensor) -> Tensor:
            x_BLH = model.encoded(patches(images), everything.expand(len(images), -1))
            return torch.cat([x_BLH.mean(1), torch.ones(len(images), 1)], dim=1).double()

        x_BH, (_, class_B) = features(self.training[0]), self.training
        target_BC = torch.nn.functional.one_hot(class_B, CLASSES).double()
        penalty = 1e-3 * torch.eye(x_BH.shape[1]).double() * len(x_BH)
        weight_HC = torch.linalg.solve(x_BH.T @ x_BH + penalty, x_BH.T @ target_BC)
        guess_B = (features(self.held_out[0]) @ weight_HC).argmax(-1)
        return float((guess_B == self.held_out[1]).double().mean())

    def _load(self, model: MaskedAutoencoder, visible_BV: Tensor) -> tuple[list[Tensor], float]:
        """Return the load per expert of each layer for visible patches, and its mean coefficient of variation."""
        model.encoded(patches(self.held_out[0]), visible_BV)
        load = [routing.counts_E.double() for routing in routings(model.encoder)]
        cvs = [float(m.value or 0) for one in load for m in load_metrics(one) if m.name == "load_cv"]
        return load, sum(cvs) / len(cvs)

    def _identities(self) -> list[Identity]:
        """Return how many masks change with the image, and how many statements on the spectra do not hold."""
        images = self.held_out[0]
        changed = sum(
            int((task.visible(images, "a") != task.visible(1 - images.flip(0), "a")).sum())
            for task in self.tasks.values()
        )
        noise_seed = substream(self.seed, "colormae", "masks")
        banks = {colour: bank(colour, JUDGED, 4 * PATCHES, noise_seed) for colour in COLOURS}
        return [
            Identity("patches that are visible for one image alone", float(changed)),
            Identity("statements about spectra that do not hold", spectral_gap(banks)),
        ]
