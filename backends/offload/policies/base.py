"""What a policy of a cache is, and what most of them share. Imports no torch."""

from __future__ import annotations

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

    def start(self, layout: Layout, capacity: int) -> Iterable[Key]:
        """Begin with an empty cache."""
        return ()

    def begin(self, moment: Moment) -> None:
        """See an access; most policies look at single keys only."""

    def touch(self, key: Key, moment: Moment) -> None:
        """Note that ``key`` is used."""

    def place(self, incoming: Key, candidates: Collection[Key], free: int, moment: Moment) -> Key | None:
        """Take a free slot, else drop the candidate that is worth least."""
        if free:
            return None
        return min(candidates, key=lambda key: (self.worth(key, moment), key), default=incoming)

    def admit(self, key: Key, moment: Moment) -> None:
        """Note that ``key`` comes in."""

    def drop(self, key: Key) -> None:
        """Note that ``key`` goes."""

    def worth(self, key: Key, moment: Moment) -> tuple[float, ...]:
        """Return what keeping ``key`` is worth; the least goes first."""
        raise NotImplementedError


__all__ = ["Access", "CachePolicy", "Key", "Layout", "Moment", "Ranked"]
