"""Values that change while a model is trained, as functions of the progress in [0, 1]. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """From ``start`` at progress 0 to ``end`` at progress ``until``, and ``end`` from then on.

    ``linear`` moves by equal differences, ``exponential`` by equal ratios: start * (end / start) ** (progress / until).
    """

    start: float
    end: float
    shape: Literal["linear", "exponential"] = "linear"
    until: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1:
            raise ValueError(f"until={self.until} is a progress; it must lie in (0, 1].")
        if self.shape == "exponential" and min(self.start, self.end) <= 0:
            raise ValueError(f"an exponential schedule from {self.start} to {self.end} needs positive values.")

    def at(self, progress: float) -> float:
        """Return the value at ``progress``; before 0 and after ``until`` that of the nearer end."""
        done = min(max(progress / self.until, 0.0), 1.0)
        if done == 1.0:
            return self.end
        if self.shape == "exponential":
            return self.start * math.pow(self.end / self.start, done)
        return self.start + (self.end - self.start) * done


def k_at(schedule: Schedule, progress: float) -> int:
    """Return a whole number of experts, at least 1: the nearest to the schedule, so that every k has its time.

    Dense-to-sparse gates go from all experts to one, AdaMoE's annealing from a larger k to its own.
    """
    return max(1, round(schedule.at(progress)))


def value_at(value: float | Schedule, progress: float) -> float:
    """Return a number as it is, and a schedule's value at ``progress``: for settings that may be either."""
    return value.at(progress) if isinstance(value, Schedule) else value
