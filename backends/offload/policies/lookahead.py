"""Policies that know what is to come: Belady's, which nobody can beat, and one that sees a window (Read-ME)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

from .base import Key, Layout, Moment
from .recency import LRU


class Belady(LRU):
    """Drops whoever is used next the furthest away, the incoming expert included; beyond ``window`` accesses, LRU.

    Without a window it is the bound: no demand-driven policy has more hits on the same accesses. With one it is the
    eviction of Read-ME (NeurIPS 2024), whose pre-gating router knows the experts of tokens that wait. A policy that
    begins with a filled cache is bounded by a Belady that begins with the same: ``initial``.
    """

    needs_future = True

    def __init__(self, window: int | None = None, initial: Iterable[Key] = ()) -> None:
        if window is not None and window < 0:
            raise ValueError(f"window={window} must be at least 0 accesses.")
        super().__init__()
        self.window, self.initial = window, tuple(initial)

    def start(self, layout: Layout, capacity: int) -> Iterable[Key]:
        """Begin with what was given."""
        return self.initial

    def place(self, incoming: Key, candidates: Collection[Key], free: int, moment: Moment) -> Key | None:
        """Take a free slot, else drop the candidate, or the incoming expert, that is worth least."""
        return super().place(incoming, [*candidates, incoming], free, moment)

    def worth(self, key: Key, moment: Moment) -> tuple[float, ...]:
        """Return first how near the next use is, then when the last one was."""
        assert moment.future is not None, "a policy that needs the future is given it"
        use = moment.future.next_use(key, moment.now)
        if use is None or (self.window is not None and use > moment.now + self.window):
            return (-math.inf, *super().worth(key, moment))
        return (-use, *super().worth(key, moment))
