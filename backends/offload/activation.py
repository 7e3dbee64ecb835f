"""Expert activation matrices (MoE-Infinity, arXiv 2401.14361): who was used how often, layer by expert. No torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .access import Moment

KEPT = 32
"""How many finished matrices are stored; a new one takes the place of the one that was the least often the nearest."""


def directions(matrix_LE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rows as unit vectors; rows of zeros stay zeros."""
    norm_L1 = np.linalg.norm(matrix_LE, axis=-1, keepdims=True)
    units_LE: NDArray[np.float64] = np.divide(matrix_LE, norm_L1, out=np.zeros_like(matrix_LE), where=norm_L1 > 0)
    return units_LE


class ActivationMatrices:
    """The running matrix, of tokens per expert since it was begun, and those that are finished.

    MoE-Infinity has one matrix a sequence. Accesses know no sequences: here one is finished after ``period`` steps.
    """

    def __init__(self, period: int = 16, kept: int = KEPT) -> None:
        if period < 1:
            raise ValueError(f"period={period} must be at least 1 step.")
        self.period, self.kept = period, kept
        self.running_LE = np.zeros((0, 0))
        self._stored: list[NDArray[np.float64]] = []
        self._directions: list[NDArray[np.float64]] = []
        self._nearest_at: list[int] = []  # how often each was the nearest
        self._began: int | None = None

    def see(self, moment: Moment) -> None:
        """Add an access to the running matrix, after finishing it where its steps are over."""
        access, layout = moment.access, moment.layout
        number = access.step // self.period
        if number != self._began:
            if self._began is not None:
                self._finish()
            self._began = number
            self.running_LE = np.zeros((len(layout.layers), layout.experts))
        self.running_LE[layout.layers.index(access.layer), list(access.experts)] += access.tokens

    def nearest(self, moment: Moment) -> NDArray[np.float64] | None:
        """Return the stored matrix that is nearest to the running one; None while none is stored.

        Near is a high mean cosine of the rows after this layer, as in the authors' code, which makes the rows up to it
        equal in all; at the last layer no row is left, and all rows are compared. Ties go to the one stored last: with
        nothing to tell, as at the first step of a matrix, a text goes on as it was.
        """
        if not self._stored:
            return None
        first = moment.layout.layers.index(moment.access.layer) + 1
        rows = slice(first if first < len(moment.layout.layers) else 0, None)
        mine_LE = directions(self.running_LE)[rows]
        cosines = [float((mine_LE * one_LE[rows]).sum()) for one_LE in self._directions]
        best = max(range(len(cosines)), key=lambda place: (cosines[place], place))
        self._nearest_at[best] += 1
        return self._stored[best]

    def _finish(self) -> None:
        if len(self._stored) == self.kept:
            least = min(range(self.kept), key=self._nearest_at.__getitem__)
            for one in (self._stored, self._directions, self._nearest_at):
                del one[least]
        self._stored.append(self.running_LE)
        self._directions.append(directions(self.running_LE))
        self._nearest_at.append(1)
