"""Task ``neurons``: an MLP, dense or with its largest hidden activations alone, under wrong labels (Lazy Neuron).

Lazy Neuron (arXiv 2210.06313) finds that a transformer that keeps the k largest activations of each token is less
misled by label noise and corruption and better calibrated. Here an MLP of width WIDTH on scikit-learn's digits keeps
KEPT of them in training and in judgement. Shape letters: B images, I pixels, F width, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ...contracts import Check, Metric
from ..models import substream
from .digits import CORRUPTIONS, Digits, load_digits
from .judged import Judged, calibration_error, items_of, mean

WIDTH, KEPT = 512, 16
STEPS, BATCH, RATE = 800, 64, 0.002
CLASSES = 10
BOUND = 1e-5
TIE = 1e-5
"""Two activations so near to each other, of the largest, may change places in float32."""


class LazyMlp(nn.Module):
    """Pixels to classes through one ReLU layer, of which ``kept`` channels pass on their value; None: all."""

    def __init__(self, kept: int | None) -> None:
        super().__init__()
        self.kept = kept
        self.up, self.down = nn.Linear(64, WIDTH), nn.Linear(WIDTH, CLASSES)

    def hidden(self, image_BI: Tensor) -> Tensor:
        """Return what the second layer reads, [B, F]."""
        hidden_BF: Tensor = self.up(image_BI).relu()
        if self.kept is None:
            return hidden_BF
        top = hidden_BF.topk(self.kept, dim=-1)
        return torch.zeros_like(hidden_BF).scatter(-1, top.indices, top.values)

    def forward(self, image_BI: Tensor) -> Tensor:
        """Return logits [B, K]."""
        return self.down(self.hidden(image_BI))  # type: ignore[no-any-return]  # nn.Module's call has no type

    @torch.no_grad()
    def oracle(self, image_BI: Tensor) -> Tensor:
        """Return the logits in float64, by the sum over the channels that float64 says are the largest, [B, K].

        Of images whose last channel and the next are within TIE of each other the network's own choice is taken.
        """
        up, down = self.up.weight.double(), self.down.weight.double()
        hidden_BF = (image_BI.double() @ up.T + self.up.bias.double()).relu()
        if self.kept is not None:
            first = hidden_BF.topk(self.kept + 1, dim=-1)
            largest_BF = torch.zeros_like(hidden_BF).scatter(-1, first.indices[:, : self.kept], 1.0)
            tied_B1 = first.values[:, -2:-1] - first.values[:, -1:] <= TIE * first.values[:, :1]
            hidden_BF = hidden_BF * torch.where(tied_B1, (self.hidden(image_BI) > 0).double(), largest_BF)
        return hidden_BF @ down.T + self.down.bias.double()


def judge(workload: Mapping[str, Any], seed: int) -> Judged:
    """Train with wrong labels among the right ones, and judge on right ones."""
    digits = load_digits(seed)
    model = LazyMlp(KEPT if workload["method"] == "topk" else None)
    label_B = wrong_labels(digits.train_label_B, workload["label_noise"], seed)
    image_BI = digits.train_B1YX.flatten(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    rng = torch.Generator().manual_seed(substream(seed, "batches"))
    for _ in range(workload["steps"] or STEPS):
        chosen = torch.randint(len(label_B), (BATCH,), generator=rng)
        optimizer.zero_grad(set_to_none=True)
        nnf.cross_entropy(model(image_BI[chosen]), label_B[chosen]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return judged(model.eval(), digits, seed)


def wrong_labels(label_B: Tensor, part: float, seed: int) -> Tensor:
    """Return the labels with a ``part`` of them, chosen by ``seed``, moved to another class."""
    rng = torch.Generator().manual_seed(substream(seed, "labels"))
    chosen = torch.randperm(len(label_B), generator=rng)[: round(part * len(label_B))]
    moved = label_B.clone()
    moved[chosen] = (moved[chosen] + torch.randint(1, CLASSES, (len(chosen),), generator=rng)) % CLASSES
    return moved


@torch.no_grad()
def judged(model: LazyMlp, digits: Digits, seed: int) -> Judged:
    """Return accuracy clean and corrupted, calibration error, and the share of hidden activations that are not zero."""
    image_B1YX, label_B = digits.test_B1YX, digits.test_label_B
    logits_BK = model(image_B1YX.flatten(1))
    rng = torch.Generator().manual_seed(substream(seed, "corruptions"))
    right = {
        f"{name}_accuracy": (model(change(image_B1YX, rng).flatten(1)).argmax(-1) == label_B).float()
        for name, change in CORRUPTIONS.items()
    }
    right["corrupted_accuracy"] = torch.stack(list(right.values())).mean(0)
    right["accuracy"] = (logits_BK.argmax(-1) == label_B).float()
    metrics = [mean(name, values, substream(seed, "bootstrap", name)) for name, values in right.items()]
    nonzero = float((model.hidden(image_B1YX.flatten(1)) != 0).float().mean())
    metrics.append(Metric("calibration_error", calibration_error(logits_BK.softmax(-1), label_B), "1", n=len(label_B)))
    metrics.append(Metric("nonzero_share", nonzero, "1", n=len(label_B) * WIDTH))
    wanted_BK = model.oracle(image_B1YX.flatten(1))
    error = float((logits_BK - wanted_BK).abs().max() / wanted_BK.abs().max())
    told = "" if error <= BOUND else "the network is not the sum over the channels that pass"
    items = items_of("neurons", {"accuracy": right["accuracy"].tolist()})
    return Judged(metrics, items, Check(not told, error, BOUND, told))
