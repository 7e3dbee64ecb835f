"""Policies that look at when an expert was last used."""

from __future__ import annotations

from .base import Key, Moment, Ranked


class LRU(Ranked):
    """Drops the least recently used."""

    def __init__(self) -> None:
        self._clock = 0
        self._last: dict[Key, int] = {}

    def touch(self, key: Key, moment: Moment) -> None:
        """Note the use."""
        self._clock += 1
        self._last[key] = self._clock

    admit = touch

    def worth(self, key: Key, moment: Moment) -> tuple[float, ...]:
        """Return when it was last used, or brought."""
        return (self._last[key],)
