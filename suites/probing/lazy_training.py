"""Probe ``lazy_training``: ReLU models of digits become lazy as they are trained (arXiv 2210.06313).

Every model is trained plainly and with its ``active`` largest hidden activations alone; no random number is drawn
between the two but those of the seed. Shape letters: B images, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ...contracts import Case, Check, Facts, Metric, Registry, Series
from ...moe.probes.lazy import nonzero_share
from ..digest import sha256_of
from ..digits import digits
from ..models import substream
from ..quality.calibration import bin_gaps
from .base import Stage, close, holds
from .lazy_models import LazyFFN, LazyModel

BATCH, RATE = 64, 2e-3
HELD_OUT = 0.25
BINS = 15


@dataclass(frozen=True)
class Trained:
    """One model: shares of activations that are not zero on held-out digits, before and after, by FFN, and quality.

    ``ece`` is the calibration error over bins of equal mass (suite ``robustness`` has bins of equal width).
    """

    before: tuple[float, ...]
    after: tuple[float, ...]
    accuracy: float
    ece: float


class LazyTraining:
    """Trains every pair of width and depth, plainly and with top-k."""

    def __init__(self, case: Case, registry: Registry) -> None:
        self.case, self.given = case, case.workload
        self.data = dealt(substream(case.seed, "held out"))
        self.input_sha256 = sha256_of(self.data[0])
        self.found: dict[tuple[int, int, bool], Trained] = {}

    @property
    def stages(self) -> Sequence[Stage]:
        """One model after another."""
        pairs = [(width, depth) for width in self.given["widths"] for depth in self.given["depths"]]
        return [partial(self.one, *pair, kept) for pair in pairs for kept in (False, True)]

    def one(self, width: int, depth: int, kept: bool) -> list[Check]:
        """Train one model; its hidden activations, put through what follows, must give its output."""
        torch.manual_seed(substream(self.case.seed, "weights", width, depth))
        active = self.given["active"] if kept else None
        model = LazyModel(self.given["shape"], width, depth, active)
        images_BX, labels_B, test_BX, test_B = self.data
        before = shares(model, test_BX)
        fit(model, images_BX, labels_B, self.given["epochs"], substream(self.case.seed, "order"))
        after, checks = shares(model, test_BX), checked(model, test_BX, active)
        with torch.no_grad():
            confidence_B, best_B = model(test_BX).double().softmax(-1).max(-1)
        right_B = (best_B == test_B).double()
        gaps_BB = bin_gaps(confidence_B, right_B, BINS)
        ece = float(gaps_BB.sum(0).abs().sum() / len(test_B))
        self.found[width, depth, kept] = Trained(before, after, float(right_B.mean()), ece)
        return [*checks, holds(all(map(math.isfinite, (ece, *after))), "training left no finite numbers")]

    def facts(self) -> Facts:
        """Return shares, accuracy and calibration error of every model, named by width and depth."""
        metrics, series = [], []
        count = len(self.data[3])
        for (width, depth, kept), one in self.found.items():
            name = f"{'topk' if kept else 'plain'}_{width}x{depth}"
            metrics += [
                Metric(f"{name}_nonzero_before", sum(one.before) / depth, "1", n=count),
                Metric(f"{name}_nonzero", sum(one.after) / depth, "1", n=count),
                Metric(f"{name}_accuracy", one.accuracy, "1", n=count),
                Metric(f"{name}_ece", one.ece, "1", n=count),
            ]
            series.append(Series(f"{name}_nonzero_by_layer", one.after, "1"))
        return Facts(tuple(metrics), tuple(series))

    def close(self) -> None:
        """Nothing to free."""


def dealt(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return scikit-learn's digits, pixels in [-1, 1], as (images, labels, held-out images, held-out labels)."""
    images_BYX, labels_B = digits()
    images_BX = 2 * images_BYX.flatten(1) - 1
    order_B = torch.randperm(len(labels_B), generator=torch.Generator().manual_seed(seed))
    held, rest = order_B[: round(HELD_OUT * len(order_B))], order_B[round(HELD_OUT * len(order_B)) :]
    return images_BX[rest], labels_B[rest], images_BX[held], labels_B[held]


def fit(model: LazyModel, images_BX: Tensor, labels_B: Tensor, epochs: int, seed: int) -> None:
    """Train by AdamW on cross-entropy, in an order of images that the seed decides."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    rng = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for part in torch.split(torch.randperm(len(labels_B), generator=rng), BATCH):
            optimizer.zero_grad()
            loss = nnf.cross_entropy(model(images_BX[part]), labels_B[part])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


@torch.no_grad()
def shares(model: LazyModel, images_BX: Tensor) -> tuple[float, ...]:
    """Return the share of hidden activations that are not zero, of every FFN."""
    model(images_BX)
    return tuple(nonzero_share(ffn.hidden) for ffn in model.ffns if isinstance(ffn, LazyFFN))


@torch.no_grad()
def checked(model: LazyModel, images_BX: Tensor, active: int | None) -> list[Check]:
    """See that the counted activations are those that the model's output is made of, and that top-k keeps k at most."""
    logits_BC = model(images_BX)
    last = model.ffns[-1]
    entering: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda module, inputs: entering.append(inputs[0]))
    model(images_BX)
    hook.remove()
    again_BC = model.head((entering[0] + last.hidden @ last.down.weight.T + last.down.bias).mean(1))  # type: ignore
    most = max(int((ffn.hidden != 0).sum(-1).max()) for ffn in model.ffns)  # type: ignore[union-attr]
    few = active is None or most <= active
    return [close(again_BC, logits_BC, "hidden activations put through"), holds(few, f"{most} activations were kept")]
