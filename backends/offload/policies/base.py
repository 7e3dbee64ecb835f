"""What a policy of a cache is, and what most of them share. Imports no torch."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable
from typing import Protocol

from ..access import Access, Key, Layout, Moment


class CachePolicy(Protocol):
    """Decides who stays; pure bookkeeping, the same object for the simulator and for the real store.

    A cache calls ``start`` once, ``begin`` before it serves an access, ``touch`` for every key used, ``place`` for a
    key that may come in, then ``admit`` and ``drop`` as things happen.
    """

    needs_future: bool

    def start(self, layout: Layout, capacity: int) -> Iterable[Key]:
        """Return the keys that are in the cache from the start, at most ``capacity``."""

    def begin(self, moment: Moment) -> None:
        """See an access before it is served."""

    def touch(self, key: Key, moment: Moment) -> None:
        """Note that ``key`` is used, be it in the cache or not."""

    def place(self, incoming: Key, candidates: Collection[Key], free: int, moment: Moment) -> Key | None:
        """Return who goes so that ``incoming`` may come in: one of ``candidates``, or ``incoming`` itself, which then
        does not stay; None where one of the ``free`` slots is taken."""

    def admit(self, key: Key, moment: Moment) -> None:
        """Note that ``key`` comes in."""

    def drop(self, key: Key) -> None:
        """Note that ``key`` goes."""


class Ranked:
    """A policy that drops whoever is worth least; ties go to the lower key, so that every run decides the same."""

    needs_future = False
    refuses = False
    """Whether the incoming expert is compared with the others: it does not stay where it is worth least."""

    def start(self, layout: Layout, capacity: int) -> Iterable[Key]:
        """Begin with an empty cache."""
        return ()

    def begin(self, moment: Moment) -> None:
        """See an access; most policies look at single keys only."""

    def touch(self, key: Key, moment: Moment) -> None:
        """Note that ``key`` is used."""

    def place(self, incoming: Key, candidates: Collection[Key], free: int, moment: Moment) -> Key | None:
        """Take a free slot, else drop the candidate that is worth least; without any, the incoming expert."""
        if free:
            return None
        least = self.least(candidates, moment)
        if least is not None and self.refuses:
            return Ranked.least(self, (least, incoming), moment)
        return incoming if least is None else least

    def least(self, candidates: Collection[Key], moment: Moment) -> Key | None:
        """Return the candidate that is worth least; None without any."""
        return min(candidates, key=lambda key: (self.worth(key, moment), key), default=None)

    def admit(self, key: Key, moment: Moment) -> None:
        """Note that ``key`` comes in."""

    def drop(self, key: Key) -> None:
        """Note that ``key`` goes."""

    def worth(self, key: Key, moment: Moment) -> tuple[float, ...]:
        """Return what keeping ``key`` is worth; the least goes first."""
        raise NotImplementedError


class Settled(Ranked):
    """A policy where the worth of an expert changes only when it is used or comes in: a heap finds the least.

    So a model of thousands of experts is simulated in seconds. Who goes is the same as without the heap.
    """

    def __init__(self) -> None:
        self._settled: dict[Key, tuple[float, ...]] = {}  # of everybody in the cache
        self._heap: list[tuple[tuple[float, ...], Key]] = []  # besides them, what they were worth before

    def use(self, key: Key, moment: Moment) -> None:
        """Note that ``key`` is used."""
        raise NotImplementedError

    def touch(self, key: Key, moment: Moment) -> None:
        """Note that ``key`` is used."""
        self.use(key, moment)
        if key in self._settled:
            self.settle(key, moment)

    def admit(self, key: Key, moment: Moment) -> None:
        """Note that ``key`` comes in."""
        self.settle(key, moment)

    def drop(self, key: Key) -> None:
        """Note that ``key`` goes."""
        del self._settled[key]

    def settle(self, key: Key, moment: Moment) -> None:
        """Work the worth of ``key`` out, until it is used or comes in again."""
        self._settled[key] = worth = self.worth(key, moment)
        heapq.heappush(self._heap, (worth, key))
        if len(self._heap) > 2 * len(self._settled) + 64:  # hits alone must not fill the memory
            self._heap = [(worth, key) for key, worth in self._settled.items()]
            heapq.heapify(self._heap)

    def least(self, candidates: Collection[Key], moment: Moment) -> Key | None:
        """Return the candidate that is worth least; None without any."""
        found, barred = None, []
        while self._heap and found is None:
            worth, key = self._heap[0]
            if self._settled.get(key) == worth and key in candidates:
                found = key
            else:
                barred.append(heapq.heappop(self._heap))
        for worth, key in barred:
            if self._settled.get(key) == worth:
                heapq.heappush(self._heap, (worth, key))
        return found


__all__ = ["Access", "CachePolicy", "Key", "Layout", "Moment", "Ranked"]
