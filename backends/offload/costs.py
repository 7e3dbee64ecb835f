"""What things cost on a machine, in seconds: measured or given. Imports no torch."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Curve:
    """Seconds over a number (of tokens, of bytes), measured at ``points`` of ascending number.

    Straight between two points, and beyond the last as between the last two, never falling there; below the first as
    at the first. Nothing costs nothing.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        numbers = [number for number, _ in self.points]
        if not numbers or any(a >= b for a, b in pairwise(numbers)):
            raise ValueError(f"points {self.points} of a curve must be of ascending number, and at least one.")
        if min(seconds for _, seconds in self.points) < 0:
            raise ValueError(f"points {self.points} of a curve must not be negative.")

    @classmethod
    def line(cls, fixed: float, each: float) -> Curve:
        """Return ``fixed`` seconds plus ``each`` for one of the number."""
        return cls(((0, fixed), (1, fixed + each)))

    def __call__(self, number: float) -> float:
        """Return the seconds of ``number``."""
        first, last = self.points[0], self.points[-1]
        if number <= 0:
            return 0.0
        if number <= first[0]:
            return first[1]
        if len(self.points) == 1:
            return last[1]
        place = min(bisect_right(self.points, number, key=lambda point: point[0]), len(self.points) - 1)
        (x0, y0), (x1, y1) = self.points[place - 1], self.points[place]
        slope = (y1 - y0) / (x1 - x0)
        if number > last[0]:
            return y1 + max(slope, 0.0) * (number - x1)
        return y0 + slope * (number - x0)


@dataclass(frozen=True)
class ExpertCosts:
    """Seconds of one expert: to bring it, and to compute a number of its tokens there (``fast``) or where it lies."""

    load: float
    fast: Curve
    in_place: Curve
