"""Policies that look at when an expert was last used."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable

from .base import Key, Layout, Moment, Ranked, Settled


class LRU(Settled):
    """Drops the least recently used."""

    def __init__(self) -> None:
        super().__init__()
        self._clock = 0
        self._last: dict[Key, int] = {}

    def use(self, key: Key, moment: Moment) -> None:
        """Note the use."""
        self._clock += 1
        self._last[key] = self._clock

    def admit(self, key: Key, moment: Moment) -> None:
        """Note the coming, which counts as a use: what is brought ahead is wanted soon."""
        LRU.use(self, key, moment)
        self.settle(key, moment)

    def worth(self, key: Key, moment: Moment) -> tuple[float, ...]:
        """Return when it was last used, or brought."""
        return (self._last.get(key, 0),)


class LRUK(LRU):
    """LRU-k (O'Neil et al., 1993): drops whoever's ``k``-th last use is the longest ago; those used less often, first.

    Uses are counted also while an expert is not in the cache; all uses within one access are one.
    """

    def __init__(self, k: int = 2) -> None:
        if k < 1:
            raise ValueError(f"k={k} must be at least 1.")
        super().__init__()
        self.k = k
        self._uses: dict[Key, deque[int]] = {}

    def use(self, key: Key, moment: Moment) -> None:
        """Note the use."""
        super().use(key, moment)
        self._uses.setdefault(key, deque(maxlen=self.k)).append(moment.now)

    def worth(self, key: Key, moment: Moment) -> tuple[float, ...]:
        """Return the time of the k-th last use, then of the last one."""
        uses = self._uses.get(key)
        oldest = uses[0] if uses is not None and len(uses) == self.k else -math.inf
        return (oldest, *super().worth(key, moment))


class PerLayer(Ranked):
    """One LRU a layer (mixtral-offloading): slots are divided evenly, and only its own layer makes room for an expert.

    Where slots do not divide, the first layers have one more. A layer without slots keeps nothing.
    """

    def start(self, layout: Layout, capacity: int) -> Iterable[Key]:
        """Divide the slots."""
        each, more = divmod(capacity, len(layout.layers))
        self._free = {layer: each + (place < more) for place, layer in enumerate(layout.layers)}
        self._layers = {layer: LRU() for layer in layout.layers}
        return ()

    def touch(self, key: Key, moment: Moment) -> None:
        """Note the use."""
        self._layers[key[0]].touch(key, moment)

    def place(self, incoming: Key, candidates: Collection[Key], free: int, moment: Moment) -> Key | None:
        """Take a free slot of the layer, else drop its least recently used; the incoming expert where it has none."""
        return self._layers[incoming[0]].place(incoming, candidates, self._free[incoming[0]], moment)

    def admit(self, key: Key, moment: Moment) -> None:
        """Note the coming."""
        self._layers[key[0]].admit(key, moment)
        self._free[key[0]] -= 1

    def drop(self, key: Key) -> None:
        """Note the going."""
        self._layers[key[0]].drop(key)
        self._free[key[0]] += 1
