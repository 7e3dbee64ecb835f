"""Samples in their order: are neighbours alike, from where on are they steady, and where did the level change?"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .arrays import floats


def lag1_autocorrelation(x: ArrayLike) -> float | None:
    """Return the correlation of neighbours (biased estimator, in [-1, 1]); None for fewer than 3 or equal values."""
    values = floats(x)
    centred = values - values.mean() if len(values) else values
    variance = float(centred @ centred)
    if len(values) < 3 or variance == 0 or np.ptp(values) == 0:  # a mean of equal values may be off by rounding
        return None
    return float(centred[1:] @ centred[:-1]) / variance


MOST_CORRELATED = 0.95
"""Neighbours more alike than this are taken as this alike."""


def corrected_lag1(x: ArrayLike) -> float:
    """Return the lag-1 autocorrelation with its bias in short series put back (Marriott & Pope 1954); 0 where
    unknown."""
    raw = lag1_autocorrelation(x)
    return 0.0 if raw is None else raw + (1 + 3 * raw) / len(floats(x))


def steady_start(turn_values: ArrayLike, window: int, tolerance: float) -> int | None:
    """Return the first index from which the medians of two windows in a row agree within ``tolerance`` (relative).

    None means that no such index exists (yet); two whole windows must follow the index.
    """
    values = floats(turn_values)
    if window < 1 or tolerance < 0:
        raise ValueError(f"a window has at least one turn and a tolerance is not negative: {window}, {tolerance}.")
    if len(values) < 2 * window:
        return None
    medians = np.median(np.lib.stride_tricks.sliding_window_view(values, window), axis=1)
    first, second = medians[:-window], medians[window:]
    agree = np.abs(second - first) <= tolerance * np.minimum(np.abs(first), np.abs(second))
    return int(np.argmax(agree)) if agree.any() else None
