"""Figures of quantized layers: bytes, bits, errors of weights and of outputs. Imported by workers only.

Shape letters: T tokens, E experts that own weights, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...contracts import Metric, Series
from ...moe.experts import ExpertStore
from ..models import substream
from .bootstrap import metric_of
from .distance import FIGURES
from .on_disk import OnDisk
from .scores import STATISTICS

UNITS = {**{name: unit for name, (unit, _) in STATISTICS.items()}, "ece": "1", **dict.fromkeys(FIGURES, "1")}
"""The figures of a text, which a model without one does not have."""


@dataclass(frozen=True)
class Layer:
    """One layer as it was quantized.

    ``weight_squares_E2`` float64 are |W - W'|^2 and |W|^2 of every expert (None: the weights were smoothed first, and
    there is nothing to hold them against), ``error_T`` float64 the relative error of each held-out token's output.
    ``disk`` None: no file could be written; ``elapsed`` None: nothing was quantized; a fold before is not in it.
    """

    store: ExpertStore
    disk: OnDisk | None
    elapsed: float | None
    weight_squares_E2: Tensor | None
    error_T: Tensor

    @property
    def file_bytes(self) -> float | None:
        """Bytes of the file."""
        return None if self.disk is None else float(self.disk.file_bytes)

    @property
    def header_bytes(self) -> float | None:
        """Those of its header."""
        return None if self.disk is None else float(self.disk.header_bytes)

    @property
    def bytes_E(self) -> list[int]:
        """Bytes in memory of every expert."""
        return [gate_up.nbytes + down.nbytes for gate_up, down in zip(self.store.gate_up, self.store.down, strict=True)]

    @property
    def weights_E(self) -> list[int]:
        """Weights of every expert."""
        pairs = zip(self.store.gate_up, self.store.down, strict=True)
        return [sum(int(part.shape[0]) * int(part.shape[1]) for part in pair) for pair in pairs]


def weight_squares(store: ExpertStore, dense: ExpertStore) -> Tensor:
    """Return |W - W'|^2 and |W|^2 of every expert, [E, 2] float64; W of ``dense``, W' as ``store`` decodes."""
    rows = []
    for slot in range(len(store.ffn_ids)):
        pairs = zip(dense.weights(slot), store.weights(slot), strict=True)
        rows.append([(_squares(one.double() - other), _squares(one)) for one, other in pairs])
    return torch.tensor(rows, dtype=torch.float64).sum(1)


def _squares(weight_OI: Tensor) -> float:
    return float(weight_OI.double().square().sum())


def layer_metrics(layers: Mapping[int, Layer], seed: int) -> list[Metric]:
    """Return the figures of all layers together; what one of them lacks is None."""
    chosen = list(layers.values())
    stored = sum(layer.store.nbytes for layer in chosen)
    weights = sum(sum(layer.weights_E) for layer in chosen)
    mean_T = torch.stack([layer.error_T for layer in chosen]).mean(0)
    columns_T2 = torch.stack([mean_T, torch.ones_like(mean_T)], dim=1)
    return [
        Metric("expert_bytes", float(stored), "byte"),
        Metric("file_bytes", _sum([layer.file_bytes for layer in chosen]), "byte"),
        Metric("file_header_bytes", _sum([layer.header_bytes for layer in chosen]), "byte"),
        Metric("bits_per_weight", 8.0 * stored / weights, "bit", n=weights),
        Metric("quantize_elapsed", _sum([layer.elapsed for layer in chosen]), "s", n=len(chosen)),
        Metric("weight_error", _relative([layer.weight_squares_E2 for layer in chosen]), "1", n=weights),
        metric_of(
            "held_out_error",
            "1",
            columns_T2,
            lambda sums: sums[..., 0] / sums[..., 1],
            substream(seed, "bootstrap"),
        ),
    ]


def layer_series(layers: Mapping[int, Layer]) -> tuple[Series, ...]:
    """Return the figures by layer, in the order of their indices, and by expert for each layer."""
    chosen = [layers[index] for index in sorted(layers)]
    by_layer: dict[tuple[str, str], list[float | None]] = {
        ("expert_bytes_by_layer", "byte"): [float(layer.store.nbytes) for layer in chosen],
        ("file_bytes_by_layer", "byte"): [layer.file_bytes for layer in chosen],
        ("bits_per_weight_by_layer", "bit"): [8.0 * layer.store.nbytes / sum(layer.weights_E) for layer in chosen],
        ("quantize_elapsed_by_layer", "s"): [layer.elapsed for layer in chosen],
        ("weight_error_by_layer", "1"): [_relative([layer.weight_squares_E2]) for layer in chosen],
        ("held_out_error_by_layer", "1"): [float(layer.error_T.mean()) for layer in chosen],
    }
    found = [
        Series(name, tuple(value for value in values if value is not None), unit)
        for (name, unit), values in by_layer.items()
        if None not in values
    ]
    for index in sorted(layers):
        layer = layers[index]
        bits = [8.0 * b / w for b, w in zip(layer.bytes_E, layer.weights_E, strict=True)]
        found.append(Series("bits_per_weight_by_expert", tuple(bits), "bit", index))
        rows = [] if layer.weight_squares_E2 is None else [pair_2[None] for pair_2 in layer.weight_squares_E2]
        errors = [error for row_12 in rows if (error := _relative([row_12])) is not None]
        if rows and len(errors) == len(rows):
            found.append(Series("weight_error_by_expert", tuple(errors), "1", index))
    return tuple(found)


def unjudged_metrics() -> tuple[Metric, ...]:
    """Return the figures of a text, all unknown."""
    return tuple(Metric(name, None, unit) for name, unit in UNITS.items())


def _sum(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(sum(known)) if len(known) == len(values) else None


def _relative(squares: Sequence[Tensor | None]) -> float | None:
    """Return |W - W'| / |W| over all experts of some layers; None where one of them has none, or W alone is zero."""
    known = [squares_E2 for squares_E2 in squares if squares_E2 is not None]
    if len(known) < len(squares):
        return None
    off, whole = torch.cat(known).sum(0).tolist()
    if whole:
        return math.sqrt(off / whole)
    return 0.0 if off == 0 else None
