"""Super experts: the few experts whose output makes the massive activations of a model (arXiv 2507.23279).

An expert's peak is the largest |f_e(x)| of any channel and calibration token, before its routing weight. The official
code calls an expert super where its peak lies above the ``quantile`` of all peaks and above a tenth of the largest, and
looks at the layers below three quarters of the depth alone: late layers have large outputs that make nothing (a decoy).
The paper's third clause, that the layer forms massive activations, is an option. Shape letters: L layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Expert = tuple[int, int]
"""(decoder layer, expert id)."""

MASSIVE, MASSIVE_BY = 100.0, 1000.0
"""A massive activation is larger than the first, and than the second times the median (Sun et al., 2402.17762)."""


@dataclass(frozen=True)
class Criterion:
    """``quantile`` of all peaks, ``fraction`` of the largest (rounded down, as in the code), layers below ``depth``."""

    quantile: float = 0.995
    fraction: float = 0.1
    depth: float = 0.75

    def layers(self, layers: Sequence[int], total: int) -> list[int]:
        """Return those of ``layers`` that are looked at in a model of ``total`` decoder layers."""
        return [layer for layer in layers if layer < round(self.depth * total)]


def super_experts(
    peaks_LE: Tensor, layers: Sequence[int], total: int, criterion: Criterion, forming: Sequence[int] | None = None
) -> list[Expert]:
    """Return the super experts, by layer and id; ``peaks_LE`` has one row for each of ``layers``.

    With ``forming`` layers the paper's third clause cuts the result down to those. ValueError where no layer is left.
    """
    looked_at = criterion.layers(layers, total)
    if not looked_at:
        raise ValueError(f"no layer of {list(layers)} lies below {criterion.depth} of {total}; raise depth.")
    rows = [list(layers).index(layer) for layer in looked_at]
    peaks_E = peaks_LE[rows].double()
    bar = max(float(peaks_E.flatten().quantile(criterion.quantile)), math.floor(criterion.fraction * peaks_E.max()))
    found = [(looked_at[row], expert) for row, expert in (peaks_E > bar).nonzero().tolist()]
    return found if forming is None else [one for one in found if one[0] in set(forming)]


def random_set(
    super_: Sequence[Expert], layers: Sequence[int], experts: int, seed: int, total: int, criterion: Criterion
) -> list[Expert]:
    """Return as many other experts of the layers that are looked at, drawn without replacement."""
    others = [(layer, e) for layer in criterion.layers(layers, total) for e in range(experts)]
    others = [one for one in others if one not in set(super_)]
    if len(others) < len(super_):
        raise ValueError(f"{len(others)} other experts are too few to draw {len(super_)} from.")
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
    return sorted(others[i] for i in order[: len(super_)].tolist())


def forming_layers(largest_L: Sequence[float], median_L: Sequence[float]) -> list[int]:
    """Return the layers that form massive activations: |residual| after them is massive, and a tenth of it is theirs.

    ``largest_L`` and ``median_L`` are of |residual| after each layer; "a tenth of the largest of any layer is added
    here" is our reading of the paper's clause, whose code has the filter by depth in its place.
    """
    most = max(largest_L)
    before = [0.0, *largest_L[:-1]]
    return [
        layer
        for layer, (largest, median, earlier) in enumerate(zip(largest_L, median_L, before, strict=True))
        if largest > max(MASSIVE, MASSIVE_BY * median) and largest - earlier > most / 10
    ]


def told(experts: Sequence[Expert]) -> list[str]:
    """Return the ids as text, ``layer:expert``."""
    return [f"{layer}:{expert}" for layer, expert in experts]
