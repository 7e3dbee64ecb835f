"""Probe ``super_experts``: which experts make the massive activations, and what the model is without them.

Shape letters: L layers, E experts, T tokens, H hidden.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ...contracts import Case, Check, Facts, Item, Metric, Registry, Series
from ...moe.probes.super_experts import Criterion, Expert, forming_layers, random_set, super_experts, told
from ..models import substream
from .attention import Sinks, watching
from .base import Stage, close, same_bits
from .pieces import pieces, recomposes
from .scene import Scene, perplexity


class SuperExperts:
    """Peaks on calibration text; quality and attention sinks on the passage with all, without super, without random."""

    def __init__(self, case: Case, registry: Registry) -> None:
        self.scene, self.case, self.given = Scene(case, registry), case, case.workload
        self.input_sha256 = self.scene.input_sha256
        self.layers = sorted(case.layers)
        self.criterion = Criterion(self.given["quantile"], self.given["fraction"], self.given["depth"])
        self.peaks_LE = torch.zeros(len(self.layers), self.scene.shape.experts)
        self.found: list[Expert] = []
        self.losses: dict[str, Tensor] = {}
        self.sinks: dict[str, list[float]] = {}
        self.first_TH = torch.empty(0)
        self.residuals = Residuals(len(self.scene.layers))

    @property
    def stages(self) -> Sequence[Stage]:
        """Calibrate; then the model whole, without super experts, without random sets; then whole again."""
        draws = [partial(self.drawn, draw) for draw in range(self.given["draws"])]
        return [self.calibrate, self.whole, self.pruned, *draws, self.again]

    def calibrate(self) -> list[Check]:
        """Find the peaks of all experts and say which of these are super."""
        checks: list[Check] = []
        for ids_T in self.scene.windows(self.scene.calibration(self.given["calibration_tokens"])):
            self.residuals.watch(self.scene, ids_T)
            for row, call in enumerate(self.scene.calls):
                parts = list(pieces(call))
                for part in parts:
                    peak = float(part.out_NH.abs().max())
                    self.peaks_LE[row, part.expert] = max(peak, float(self.peaks_LE[row, part.expert]))
                checks.append(recomposes(call, parts))
        forming = forming_layers(self.residuals.largest, self.residuals.median) if self.given["forming"] else None
        self.found = super_experts(self.peaks_LE, self.layers, len(self.scene.layers), self.criterion, forming)
        return [*checks, *self.scene.call_checks()]

    def whole(self) -> list[Check]:
        """Judge the model as it is; dropping no expert must not move a bit."""
        ids_T = self.scene.windows()[0]
        plain_TH, with_none_TH = self.scene.undropped(ids_T), self.scene.forward(ids_T)
        checks = self._judge("", [])
        return [
            *checks,
            same_bits(with_none_TH, plain_TH, "dropping no expert"),
            close(self.first_TH, plain_TH, "attention computed in the plain way", 1e-3),
        ]

    def pruned(self) -> list[Check]:
        """Judge the model without its super experts."""
        return self._judge("pruned", self.found)

    def drawn(self, draw: int) -> list[Check]:
        """Judge the model without as many other experts of the layers that were looked at."""
        seed = substream(self.case.seed, "random experts", draw)
        total = len(self.scene.layers)
        chosen = random_set(self.found, self.layers, self.peaks_LE.shape[1], seed, total, self.criterion)
        return self._judge(f"random {draw}", chosen)

    def again(self) -> list[Check]:
        """After all dropping the model must be what it was, bit for bit."""
        with watching(self.scene.model, Sinks(len(self.scene.layers))):
            found_TH = self.scene.forward(self.scene.windows()[0])
        return [same_bits(found_TH, self.first_TH, "having dropped experts")]

    def _judge(self, name: str, gone: Sequence[Expert]) -> list[Check]:
        sinks = Sinks(len(self.scene.layers))
        with watching(self.scene.model, sinks), self.scene.without(gone):
            final_TH = self.scene.finals()
        if name == "":
            self.first_TH = final_TH[: self.scene.window]
        self.losses[name], self.sinks[name] = self.scene.losses(final_TH), sinks.mass()
        return [*sinks.checks, *self.scene.call_checks(), *self._zeroed(gone)]

    def _zeroed(self, gone: Sequence[Expert]) -> list[Check]:
        """Compare the first window with that of layers which know nothing of dropping, their weights set to zero."""
        if not gone or self.scene.quantized:
            return []
        ids_T = self.scene.windows()[0]
        with self.scene.without(gone):
            dropped_TH = self.scene.forward(ids_T)
        return [close(dropped_TH, self.scene.undropped(ids_T, gone), "experts whose weights are zero", 1e-3)]

    def facts(self) -> Facts:
        """Return peaks, who is super, and quality and sink mass of all that was judged.

        Sink mass is the mean over the layers behind the last super expert, over all where there is none.
        """
        behind = 1 + max((layer for layer, _ in self.found), default=-1)
        looked_at = len(self.criterion.layers(self.layers, len(self.scene.layers))) * self.peaks_LE.shape[1]
        mass = {name: statistics.fmean(values[behind:] or values) for name, values in self.sinks.items()}
        random = [name for name in self.losses if name.startswith("random")]
        worse = [perplexity(self.losses[name]) for name in random]
        metrics = [
            Metric("super_experts", float(len(self.found)), "1", n=looked_at),
            *self.scene.quality(self.losses[""]),
            *self.scene.quality(self.losses["pruned"], "pruned_"),
            Metric("random_perplexity", statistics.median(worse), "1", n=len(worse)),
            Metric("sink_mass", mass[""], "1"),
            Metric("pruned_sink_mass", mass["pruned"], "1"),
            Metric("random_sink_mass", statistics.median(mass[name] for name in random), "1", n=len(random)),
        ]
        series = [
            *(Series("peak", tuple(row.tolist()), "1", i) for i, row in zip(self.layers, self.peaks_LE, strict=True)),
            *(Series("sink_mass_by_layer", tuple(self.sinks[n]), "1", step=i) for i, n in enumerate(self.sinks)),
            Series("random_perplexity_by_draw", tuple(worse), "1"),
            Series("residual_peak", tuple(self.residuals.largest), "1"),
        ]
        rows = {layer: row for row, layer in enumerate(self.layers)}
        peaks = [float(self.peaks_LE[rows[layer], expert]) for layer, expert in self.found]
        items = [Item("protect", name, "peak", v) for name, v in zip(told(self.found), peaks, strict=True)]
        reason = f"super experts: {', '.join(told(self.found)) or 'none'}"
        return Facts(tuple(metrics), tuple(series), tuple(items), self.scene.executed(), {"reason": reason})

    def close(self) -> None:
        """Free the backend's session."""
        self.scene.close()


class Residuals:
    """The largest and the median |residual| after each layer, over the windows that were watched."""

    def __init__(self, layers: int) -> None:
        self.largest = [0.0] * layers
        self.median = [0.0] * layers

    def watch(self, scene: Scene, ids_T: Tensor) -> None:
        """Run one window and take in what its residual stream is after each layer; the median is the last window's."""
        for layer, state_TH in enumerate(scene.residuals(ids_T)):
            self.largest[layer] = max(self.largest[layer], float(state_TH.abs().max()))
            self.median[layer] = float(state_TH.abs().median())
