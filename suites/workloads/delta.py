"""Workload ``delta``: the Delta Activation Layer on digits that move over a canvas.

An activation is rounded to multiples of a learnt step, and only what changed since the last frame is passed on; linear
layers without bias run on the changes and add them up. Training sees the sums, which are the same numbers.
A third-party copy of the authors' file turns the sign of the step's gradient in its second use; here the gradient is
that of round(x/q) q with the rounding passed straight through.

Shape letters: B clips, T frames, I inputs, O outputs, C classes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ...contracts import Metric
from ..digits import digits_sha256
from ..models import substream
from ..workload_plugins import Delta
from . import digits
from .base import Identity, Report, checked
from .digits import CLASSES, SIDE, split
from .training import generator, schedule, trained

EXACT = 1e-5
"""How far the sum of linear changes may be from the linear sum, relative to its largest element."""

STEP = 0.1
"""The step of rounding that training begins with."""


def rounded(x: Tensor, step: Tensor) -> Tensor:
    """Return ``x`` as multiples of |step|; the gradient passes the rounding."""
    scaled = x / step.abs()
    return (scaled + (scaled.round() - scaled).detach()) * step.abs()


def changes(o_BTI: Tensor) -> Tensor:
    """Return what each frame adds to the one before; the first adds all."""
    return torch.cat([o_BTI[:, :1], o_BTI[:, 1:] - o_BTI[:, :-1]], dim=1)


class DeltaNet(nn.Module):
    """Linear layers without bias, each behind a rounding whose changes alone would have to be computed."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes))
        self.steps = nn.Parameter(torch.full((len(sizes) - 1,), STEP))

    def forward(self, x_BTI: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return logits_BTC of every frame, and the rounded input of every linear layer."""
        seen: list[Tensor] = []
        for number, linear in enumerate(self.linears):
            o_BTI = rounded(x_BTI if number == 0 else nnf.relu(x_BTI), self.steps[number])
            seen.append(o_BTI)
            x_BTI = linear(o_BTI)
        return x_BTI, seen


class MovingDigits:
    """Clips of one digit each that moves over a canvas and turns back at its edges, ``speed`` pixels a frame."""

    def __init__(self, params: Delta, seed: int) -> None:
        self.params, self.seed = params, seed
        self.training, self.held_out = split(seed)

    def clips(self, held_out: bool, count: int, name: str | int) -> tuple[Tensor, Tensor]:
        """Return frames [B, T, canvas^2] and classes [B]."""
        images, classes = self.held_out if held_out else self.training
        rng = generator(self.seed, "delta", "clips", name)
        chosen_B = torch.randint(len(images), (count,), generator=rng)
        room = self.params.canvas - SIDE
        start_B2 = torch.rand(count, 2, generator=rng) * room
        sign_B2 = torch.randint(2, (count, 2), generator=rng) * 2 - 1
        frames = torch.zeros(count, self.params.frames, self.params.canvas, self.params.canvas)
        for t in range(self.params.frames):
            place_B2 = reflected(start_B2 + sign_B2 * self.params.speed * t, room).floor().long().tolist()
            for b, (row, column) in enumerate(place_B2):
                frames[b, t, row : row + SIDE, column : column + SIDE] = images[chosen_B[b]]
        return frames.flatten(2), classes[chosen_B]


def reflected(place: Tensor, room: float) -> Tensor:
    """Return ``place`` folded into [0, room] as a ball between two walls."""
    folded = place.remainder(2 * room)
    return torch.minimum(folded, 2 * room - folded)


class DeltaTask:
    """Classify every frame; changes are charged."""

    def __init__(self, params: Delta, seed: int) -> None:
        self.params, self.data = params, MovingDigits(params, seed)
        torch.manual_seed(substream(seed, "delta", "weights"))
        self.model: DeltaNet = DeltaNet((params.canvas**2, *params.widths, CLASSES))

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return 32 clips and their classes."""
        return self.data.clips(False, 32, step)

    def loss(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return cross-entropy plus ``rate`` times the mean size of changes, the first frame's left out."""
        frames, class_B = batch
        logits_BTC, seen = self.model(frames)
        loss = nnf.cross_entropy(logits_BTC.flatten(0, 1), class_B.repeat_interleave(self.params.frames))
        moved = torch.stack([changes(o_BTI)[:, 1:].abs().mean() * o_BTI.shape[-1] for o_BTI in seen]).sum()
        return loss + self.params.rate * moved, {"loss": loss}

    def evaluate(self) -> Mapping[str, float]:
        """Nothing is watched while it trains."""
        return {}


class DeltaWorkload:
    """The same network with changes charged and not."""

    def __init__(self, params: Delta, seed: int) -> None:
        self.params, self.seed = params, seed
        self.tasks = {"": DeltaTask(params, seed), "_uncharged": DeltaTask(replace(params, rate=0.0), seed)}

    def train(self) -> float:
        """Train both."""
        settings = schedule(self.params.steps, 2e-3, self.seed, weight_decay=0.0)
        modules = (sys.modules[__name__], digits)
        identity = {"name": "delta", "seed": self.seed, "digits": digits_sha256()}
        return max(
            trained(task, settings, {**identity, "params": task.params}, modules) for task in self.tasks.values()
        )

    @torch.no_grad()
    def measure(self) -> Report:
        """Return densities and accuracy on clips of held-out digits."""
        frames, class_B = self.tasks[""].data.clips(True, 256, "judged")
        metrics, identities = [], []
        for name, task in self.tasks.items():
            logits_BTC, seen = task.model(frames)
            identities += [
                Identity(f"summed changes of layer {number}{name}", sum_gap(weight_OI, o_BTI), EXACT)
                for number, (weight_OI, o_BTI) in enumerate(zip(task.model.linears.parameters(), seen, strict=True))
            ]
            hits = (logits_BTC.argmax(-1) == class_B[:, None]).double().mean()
            metrics += [*densities(seen, name), Metric(f"accuracy{name}", float(hits), "1", n=len(class_B))]
            metrics += [Metric(f"step_{i}{name}", float(q.abs()), "1") for i, q in enumerate(task.model.steps)]
        return Report(checked(identities), tuple(metrics))


def sum_gap(weight_OI: Tensor, o_BTI: Tensor) -> float:
    """Return how far the running sum of W times the changes is from W o, over the largest element of W o."""
    direct_BTO = nnf.linear(o_BTI, weight_OI)
    summed_BTO = nnf.linear(changes(o_BTI), weight_OI).cumsum(1)
    return float((summed_BTO - direct_BTO).abs().max() / direct_BTO.abs().max().clamp_min(1e-9))


def densities(seen: list[Tensor], name: str) -> list[Metric]:
    """Return the shares of weights' work that changes and activations ask for, all layers and those but the first.

    Frames after the first count, each activation by itself. A change counts where it is not exactly zero: roundings of
    equal activations are equal.
    """
    found = []
    for which, chosen in (("", seen), ("_hidden", seen[1:])):
        total = sum(o_BTI[:, 1:].numel() for o_BTI in chosen)
        moved = sum(int((changes(o_BTI)[:, 1:] != 0).sum()) for o_BTI in chosen)
        active = sum(int((o_BTI[:, 1:] != 0).sum()) for o_BTI in chosen)
        found += [
            Metric(f"temporal_density{which}{name}", moved / total, "1", n=total),
            Metric(f"spatial_density{which}{name}", active / total, "1", n=total),
        ]
    return found
