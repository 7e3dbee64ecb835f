"""Dividing a layer's level among its sites, or its budget between channels and rank, by the output on calibration.

Shape letters: T tokens, H hidden.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..experts import ExpertStore
from ..layer import routed_sum
from ..routing import Routing
from .channel import ChannelSparsifier, calibrated, matrix_shape, sparsifiers
from .params import ChannelParams

JUDGED = 4
"""Choices are judged on the last of so many parts of the calibration tokens: the last 25 %, as in TEAL's code."""


def last_part(routing: Routing, x_TH: Tensor) -> tuple[Routing, Tensor]:
    """Return the last quarter of the tokens, and their Routing."""
    start = len(x_TH) - max(1, len(x_TH) // JUDGED)
    return routing.part(start, len(x_TH)), x_TH[start:]


def output_error(store: ExpertStore, routing: Routing, x_TH: Tensor, dense_TH: Tensor) -> float:
    """Return ||Y' - Y|| of the layer's routed output in float32."""
    return float((routed_sum(store, x_TH.float(), routing) - dense_TH).norm())


def greedy_levels(
    family: Sequence[ChannelSparsifier], store: ExpertStore, routing: Routing, x_TH: Tensor, level: float, step: float
) -> dict[str, float]:
    """Return a level for each site such that the layer leaves out ``level`` of its weights, as TEAL allocates.

    All begin at 0. The site whose next step makes the smallest error of the layer's output takes it. A step leaves out
    the same number of weights wherever it is taken: ``step`` of the smallest matrix, and less of a larger one.
    """
    routing, x_TH = last_part(routing, x_TH)
    dense_TH = routed_sum(store, x_TH.float(), routing)
    sizes = {one.site: float(torch.tensor(matrix_shape(store, one.site)).prod()) for one in family}
    total, smallest = sum(sizes.values()), min(sizes.values())
    levels = dict.fromkeys(sizes, 0.0)
    missing = level * total
    while missing > 1e-6 * total:
        tries = {}
        for site, size in sizes.items():
            weights = min(step * smallest, missing, (1.0 - levels[site]) * size)
            if weights > 0:
                tried = {**levels, site: levels[site] + weights / size}
                error = output_error(calibrated(family, store, routing, x_TH, tried), routing, x_TH, dense_TH)
                tries[site] = (error, weights)
        best = min(tries, key=lambda site: tries[site][0])
        missing -= tries[best][1]
        levels[best] += tries[best][1] / sizes[best]
    return levels


def searched_alphas(params: ChannelParams, store: ExpertStore, routing: Routing, x_TH: Tensor) -> dict[str, float]:
    """Return the alpha of each site with which the layer's output is nearest to the dense one, of all combinations."""
    routing, x_TH = last_part(routing, x_TH)
    dense_TH = routed_sum(store, x_TH.float(), routing)
    sites = list(params.scores)
    found: dict[float, dict[str, float]] = {}
    for chosen in itertools.product(params.alphas, repeat=len(sites)):
        alphas = dict(zip(sites, chosen, strict=True))
        levels = dict.fromkeys(sites, params.level)
        sparse = calibrated(sparsifiers(params, alphas), store, routing, x_TH, levels)
        found.setdefault(output_error(sparse, routing, x_TH, dense_TH), alphas)
    return found[min(found)]
