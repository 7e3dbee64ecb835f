"""Policies that look at how often an expert was used, be it in the cache or not."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .base import Key, Layout, Moment, Ranked, Settled


class LFU(Settled):
    """Drops the least frequently used, where a use counts half after every ``half_life`` steps.

    Counts that never age are no fair baseline: once the subject of a text has changed, they keep the experts of the
    former one. A use by several tokens at once is one use.
    """

    def __init__(self, half_life: float = 16) -> None:
        if not half_life > 0:
            raise ValueError(f"half_life={half_life} must be above 0 steps.")
        super().__init__()
        self.half_life = half_life
        self._count: dict[Key, float] = {}  # as it was at the last use
        self._last: dict[Key, int] = {}

    def start(self, layout: Layout, capacity: int) -> Iterable[Key]:
        """Begin with an empty cache; a step has as many accesses as there are layers."""
        self._accesses = self.half_life * len(layout.layers)
        return ()

    def use(self, key: Key, moment: Moment) -> None:
        """Age the count up to now, and add one."""
        self._count[key] = 1 + self._count.get(key, 0) * 0.5 ** ((moment.now - self._last.get(key, 0)) / self._accesses)
        self._last[key] = moment.now

    def worth(self, key: Key, moment: Moment) -> tuple[float, ...]:
        """Return the logarithm of the aged count: up to what is equal for all, that of the count plus when it was."""
        if key not in self._count:
            return (-math.inf,)
        return (math.log2(self._count[key]) + self._last[key] / self._accesses,)


class LFRU(Ranked):
    """Drops the least (uses so far) / (accesses since the last one): frequency times recency.

    [reconstructed] The name stands for several schemes; this is the product, without the partitions of others.
    """

    def __init__(self) -> None:
        self._count: dict[Key, int] = {}
        self._last: dict[Key, int] = {}

    def touch(self, key: Key, moment: Moment) -> None:
        """Note the use."""
        self._count[key] = self._count.get(key, 0) + 1
        self._last[key] = moment.now

    def worth(self, key: Key, moment: Moment) -> tuple[float, ...]:
        """Return the product, then when the last use was."""
        last = self._last.get(key, -1)
        return (self._count.get(key, 0) / (1 + moment.now - last), last)
