"""The hit rate of an LRU cache of experts from their popularity alone: Che's approximation, by layers. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from .access import Access, Layout

REST = 1e-6
"""Shares of requests that are so rare are not followed any further."""


def inclusion(accesses: Iterable[Access], layout: Layout) -> NDArray[np.float64]:
    """Return p_LE: in which share of its layer's accesses each expert is asked for."""
    count_LE, accesses_L1 = np.zeros((len(layout.layers), layout.experts)), np.zeros((len(layout.layers), 1))
    place = {layer: number for number, layer in enumerate(layout.layers)}
    for access in accesses:
        count_LE[place[access.layer], list(access.experts)] += 1
        accesses_L1[place[access.layer]] += 1
    share_LE: NDArray[np.float64] = count_LE / accesses_L1.clip(min=1)
    return share_LE


def lru_hit_rate(p_LE: NDArray[np.float64], capacity: float, alike: int = 1) -> float:
    """Return the hit rate of an LRU of ``capacity`` slots over all layers, in the long run.

    Of each row of p_LE there are ``alike`` layers.

    Assumed (independent reference model): steps are independent, and at each step every layer asks once for a fixed
    number k of distinct experts, expert e with probability p_e. One that was last used m steps ago is there if fewer
    than ``capacity`` others were used since. How many distinct ones m steps use is taken as normal, of mean
    sum(1 - (1 - p)^m) and of a variance that knows that k is fixed, with Hajek's approximation of the probability that
    two are asked for together. Hence, with D that number,

        hit rate = sum_m P(D(m) <= capacity) sum_e p_e^2 (1 - p_e)^(m - 1) / sum_e p_e.

    Che, Tung and Wang (2002) let m be continuous and D(m) equal to its mean. That has hits where none are: layers come
    in turns, so that LRU keeps nothing once a single step uses more experts than there are slots.
    """
    total = float(p_LE.sum())
    if total == 0 or capacity <= 0:
        return 0.0
    if capacity >= alike * int((p_LE > 0).sum()):
        return 1.0
    neither_LEE = _neither(p_LE)
    absent_LE, absent_both_LEE = np.ones_like(p_LE), np.ones_like(neither_LEE)
    hits, rest, steps = 0.0, 1.0, 0
    while rest > REST:
        steps += 1
        again = float((p_LE * p_LE * absent_LE).sum()) / total  # used now, m steps after the last time
        absent_LE, absent_both_LEE = absent_LE * (1 - p_LE), absent_both_LEE * neither_LEE
        distinct = alike * float((1 - absent_LE).sum())
        variance = 0.0  # one step uses k of each layer
        if steps > 1:
            variance = alike * _variance(absent_LE, absent_both_LEE)
        there = _normal(capacity + 0.5, distinct, variance)
        if there < REST:
            break
        hits, rest = hits + again * there, float((p_LE * absent_LE).sum()) / total
    return hits


def _neither(p_LE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the probability that an access asks for neither of two experts; for an expert with itself, 1 - p."""
    spread_L = (p_LE * (1 - p_LE)).sum(axis=1)
    out_LE = 1 - p_LE
    pair_LEE = out_LE[:, :, None] * out_LE[:, None, :]
    both_LEE = p_LE[:, :, None] * p_LE[:, None, :]
    less_LEE = both_LEE * pair_LEE / np.where(spread_L > 0, spread_L, 1)[:, None, None]
    neither_LEE: NDArray[np.float64] = (pair_LEE - less_LEE).clip(0, 1)
    diagonal = np.arange(p_LE.shape[1])
    neither_LEE[:, diagonal, diagonal] = out_LE
    return neither_LEE


def _variance(absent_LE: NDArray[np.float64], absent_both_LEE: NDArray[np.float64]) -> float:
    """Return the variance of the number of distinct experts: the sum of all covariances of absence."""
    return float((absent_both_LEE - absent_LE[:, :, None] * absent_LE[:, None, :]).sum())


def _normal(x: float, mean: float, variance: float) -> float:
    """Return P(X <= x)."""
    if variance <= 1e-9:
        return float(mean <= x)
    return 0.5 * (1 + math.erf((x - mean) / math.sqrt(2 * variance)))
