"""Probe ``activation_flow``: how few residual dimensions carry a token, and whether neighbours share them (MoHD).

Shape letters: T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ...contracts import Case, Check, Facts, Metric, Registry, Series
from ...moe.probes.flow import carrying, overlap
from ..models import substream
from .base import Stage, holds, same_bits
from .scene import Scene

CHECKED = 4
"""Tokens of each layer in a window whose sets are looked through."""


class ActivationFlow:
    """The residual stream after every decoder layer, on the passage."""

    def __init__(self, case: Case, registry: Registry) -> None:
        self.scene, self.case, self.share = Scene(case, registry), case, float(case.workload["share"])
        self.input_sha256 = self.scene.input_sha256
        layers = len(self.scene.layers)
        self.carried: list[list[float]] = [[] for _ in range(layers)]
        self.adjacent: list[list[float]] = [[] for _ in range(layers)]
        self.shuffled: list[list[float]] = [[] for _ in range(layers)]
        self.often: list[Tensor] = []

    @property
    def stages(self) -> Sequence[Stage]:
        """The first window twice, with and without watching; then one window after another."""
        windows = self.scene.windows()
        self.often = [torch.zeros(self.scene.shape.hidden).double() for _ in self.carried]
        return [partial(self.unmoved, windows[0]), *(partial(self.window, i, ids) for i, ids in enumerate(windows))]

    def unmoved(self, ids_T: Tensor) -> list[Check]:
        """Watching must not move a bit: the last state, normed, is what the head reads."""
        state_TH = self.scene.residuals(ids_T)[-1]
        with torch.no_grad():
            return [same_bits(self.scene.model.model.norm(state_TH), self.scene.forward(ids_T), "watching")]

    def window(self, index: int, ids_T: Tensor) -> list[Check]:
        """Find the dimensions that carry each token of a window, and compare tokens with their neighbours."""
        rng = torch.Generator().manual_seed(substream(self.case.seed, "pairs", index))
        order_T = torch.randperm(len(ids_T), generator=rng)
        states = self.scene.residuals(ids_T)
        checks = self.scene.call_checks()
        for layer, state_TH in enumerate(states):
            kept_TH = carrying(state_TH, self.share)
            self.carried[layer].append(float(kept_TH.double().mean()))
            self.adjacent[layer].append(overlap(kept_TH[1:], kept_TH[:-1]))
            self.shuffled[layer].append(overlap(kept_TH[order_T][1:], kept_TH[order_T][:-1]))
            self.often[layer] += kept_TH.double().sum(0)
            checks.append(holds(all(map(self._fewest, state_TH[:CHECKED], kept_TH[:CHECKED])), "too many dimensions"))
        return checks

    def _fewest(self, state_H: Tensor, kept_H: Tensor) -> bool:
        """Whether a set holds the share, and does not without its smallest; whether none outside it is larger."""
        size_H = state_H.double().abs()
        kept, left = size_H[kept_H], size_H[~kept_H]
        wanted, slack = self.share * float(size_H.sum()), 1e-9 * float(size_H.sum())
        enough = float(kept.sum()) >= wanted - slack and float(kept.sum() - kept.min()) < wanted + slack
        return enough and (left.numel() == 0 or float(left.max()) <= float(kept.min()))

    def facts(self) -> Facts:
        """Return means over layers and by layer; a dimension is common where it carries nine of ten tokens."""
        tokens = len(self.scene.passage.ids) - 1
        common = [float((often_H >= 0.9 * tokens).double().mean()) for often_H in self.often]
        columns = {
            "carrying_dimensions": [sum(v) / len(v) for v in self.carried],
            "adjacent_overlap": [sum(v) / len(v) for v in self.adjacent],
            "random_overlap": [sum(v) / len(v) for v in self.shuffled],
            "common_dimensions": common,
        }
        metrics = [Metric(name, sum(values) / len(values), "1", n=tokens) for name, values in columns.items()]
        series = [Series(f"{name}_by_layer", tuple(values), "1") for name, values in columns.items()]
        return Facts(tuple(metrics), tuple(series), (), self.scene.executed())

    def close(self) -> None:
        """Free the backend's session."""
        self.scene.close()
