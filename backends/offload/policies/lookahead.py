"""Policies that know what is to come: Belady's, which nobody can beat, and one that sees a window (Read-ME)."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .base import Key, Layout, Moment, Ranked
from .recency import LRU


def next_use(key: Key, moment: Moment) -> float:
    """Return when ``key`` is asked for after this access; infinity where it never is."""
    use = moment.foreseen.next_use(key, moment.now)
    return math.inf if use is None else use


class Belady(LRU):
    """Drops whoever is used next the furthest away, the incoming expert included: the bound.

    No policy that brings experts on demand has more hits on the same accesses. A policy that begins with a filled cache
    is bounded by a Belady that begins with the same: ``initial``.
    """

    needs_future = True
    refuses = True

    def __init__(self, initial: Iterable[Key] = ()) -> None:
        super().__init__()
        self.initial = tuple(initial)

    def start(self, layout: Layout, capacity: int) -> Iterable[Key]:
        """Begin with what was given."""
        return self.initial

    def begin(self, moment: Moment) -> None:
        """Work out what those in the cache from the start are worth."""
        if moment.now == 0:
            for key in self.initial:
                self.settle(key, moment)

    def worth(self, key: Key, moment: Moment) -> tuple[float, ...]:
        """Return first how near the next use is, then when the last one was."""
        return (-next_use(key, moment), *super().worth(key, moment))


class Windowed(Ranked):
    """Belady that sees the next ``window`` accesses; of those not asked for there, it drops the least recently used.

    The eviction of Read-ME (NeurIPS 2024), whose pre-gating router knows the experts of tokens that wait.
    """

    needs_future = True
    refuses = True

    def __init__(self, window: int) -> None:
        if window < 0:
            raise ValueError(f"window={window} must be at least 0 accesses.")
        self.window = window
        self._clock = 0
        self._last: dict[Key, int] = {}
        self._next: dict[Key, float] = {}  # changes only when the expert is asked for

    def touch(self, key: Key, moment: Moment) -> None:
        """Note the use, and when the next one will be."""
        self._clock += 1
        self._last[key] = self._clock
        self._next[key] = next_use(key, moment)

    def admit(self, key: Key, moment: Moment) -> None:
        """Note the coming, which counts as a use."""
        self.touch(key, moment)

    def worth(self, key: Key, moment: Moment) -> tuple[float, ...]:
        """Return first how near the next use within the window is, then when the last one was."""
        if key not in self._next:
            self._next[key] = next_use(key, moment)
        use = self._next[key]
        return (-use if use <= moment.now + self.window else -math.inf, self._last.get(key, 0))
