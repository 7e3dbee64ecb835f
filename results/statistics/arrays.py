"""What all statistics take and give: arrays of finite numbers, an estimate with its interval."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval. ``lo`` and ``hi`` are None where ``n`` is below ``n_required``."""

    value: float | None
    lo: float | None
    hi: float | None
    n: int
    n_required: int


def floats(x: ArrayLike) -> Floats:
    """Return ``x`` as float64; ValueError where it is no line of finite numbers."""
    values = np.asarray(x, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError("statistics take one-dimensional arrays of finite numbers; drop what is missing first.")
    return values
