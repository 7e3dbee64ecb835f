"""The bookkeeping of a cache of experts: who is in it, who comes, who goes. Imports no torch.

It holds no weights and knows no time: the simulator and the real store drive this very object, so the same accesses
give the same events in both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from .access import Access, Event, Future, How, Key, Layout, Moment
from .policies.base import CachePolicy


class Prefetcher(Protocol):
    """Says who will be asked for soon. ``needs_future`` as for policies."""

    needs_future: bool

    def propose(self, moment: Moment) -> Sequence[Key]:
        """Return the keys that should be brought after this access, the most urgent first."""


class Execution(Protocol):
    """Says what becomes of missing experts; whom it leaves out is brought."""

    def decide(self, missing: Sequence[Key], moment: Moment) -> Mapping[Key, How]:
        """Return what becomes of the keys of this access that are not in the cache."""


@dataclass
class Tally:
    """Counts of a cache. ``wasted`` were brought beforehand and went unused."""

    hits: int = 0
    covered: int = 0
    misses: int = 0
    prefetched: int = 0
    wasted: int = 0

    @property
    def requests(self) -> int:
        """How often an expert was asked for."""
        return self.hits + self.covered + self.misses

    @property
    def hit_rate(self) -> float | None:
        """Share of requests that found their expert in the cache, brought beforehand or not; None without requests."""
        return (self.hits + self.covered) / self.requests if self.requests else None

    @property
    def precision(self) -> float | None:
        """Share of what was brought beforehand that was used; what is not decided yet counts as unused."""
        return self.covered / self.prefetched if self.prefetched else None

    @property
    def recall(self) -> float | None:
        """Share of what would have been missed that had been brought beforehand."""
        missing = self.covered + self.misses
        return self.covered / missing if missing else None

    def count(self, event: Event) -> None:
        """Add one event."""
        name = {"hit": "hits", "covered": "covered", "miss": "misses", "prefetch": "prefetched"}[event.kind]
        setattr(self, name, getattr(self, name) + 1)


class Leaving(Collection[Key]):
    """The residents that may go: neither brought ahead nor ``spared``. A view: it costs nothing to make."""

    def __init__(self, resident: Mapping[Key, None], ahead: Mapping[Key, None], spared: Collection[Key]) -> None:
        self._resident, self._ahead, self._spared = resident, ahead, spared

    def __contains__(self, key: object) -> bool:
        return key in self._resident and key not in self._ahead and key not in self._spared

    def __iter__(self) -> Iterator[Key]:
        return (key for key in self._resident if key not in self._ahead and key not in self._spared)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Cache:
    """Slots for ``capacity`` experts of all layers under one policy, filled on demand and ahead of it.

    Of an access those in the cache are used first, then the missing ones, each in the order of their ids. Whoever was
    used may go for one that comes. What is brought ahead stays at least until its layer has been served, and takes at
    most half of the slots.
    """

    def __init__(
        self,
        policy: CachePolicy,
        capacity: int,
        layout: Layout,
        prefetcher: Prefetcher | None = None,
        future: Future | None = None,
        execution: Execution | None = None,
    ) -> None:
        if not 0 <= capacity <= layout.size:
            raise ValueError(f"capacity={capacity} must lie between 0 and the {layout.size} experts there are.")
        for one in (policy, prefetcher):
            if one is not None and one.needs_future and future is None:
                raise ValueError(f"{type(one).__name__} looks at accesses to come; give the trace beforehand.")
        self.policy, self.capacity, self.layout, self.prefetcher = policy, capacity, layout, prefetcher
        self.execution, self.future, self.tally, self.now = execution, future, Tally(), -1
        self.resident: dict[Key, None] = dict.fromkeys(policy.start(layout, capacity))
        if len(self.resident) > capacity:
            raise ValueError(f"the policy starts with {len(self.resident)} experts in {capacity} slots.")
        self._ahead: dict[Key, None] = {}  # brought and not used yet, in the order of coming

    def access(self, access: Access) -> list[Event]:
        """Serve an access and return what happened, in order: hits, misses, then what is brought ahead."""
        self.now += 1
        moment = Moment(self.now, access, self.layout, self.future)
        self.policy.begin(moment)
        missing = [key for key in access.keys if key not in self.resident]
        how = {} if self.execution is None else self.execution.decide(missing, moment)
        events = [self._hit(key, moment) for key in access.keys if key in self.resident]
        events += [self._miss(key, how.get(key, "fetch"), moment) for key in missing]
        for key in [key for key in self._ahead if key[0] == access.layer]:
            del self._ahead[key]  # its layer has been served without it: it is like any other now
            self.tally.wasted += 1
        if self.prefetcher is not None:
            events += self._bring_ahead(self.prefetcher.propose(moment), moment)
        for event in events:
            self.tally.count(event)
        return events

    def _hit(self, key: Key, moment: Moment) -> Event:
        self.policy.touch(key, moment)
        if key in self._ahead:
            del self._ahead[key]
            return Event("covered", key)
        return Event("hit", key)

    def _miss(self, key: Key, how: How, moment: Moment) -> Event:
        self.policy.touch(key, moment)
        if how in ("in_place", "low"):  # the expert itself never comes
            return Event("miss", key, None, False, how)
        evicted, kept = self._place(key, moment, ())
        return Event("miss", key, evicted, kept, how)

    def _bring_ahead(self, keys: Sequence[Key], moment: Moment) -> list[Event]:
        events = []
        spared = frozenset(keys)
        for key in keys:
            if key in self.resident or len(self._ahead) >= self.capacity // 2:
                continue
            evicted, kept = self._place(key, moment, spared)
            if kept:
                self._ahead[key] = None
                events.append(Event("prefetch", key, evicted))
        return events

    def _place(self, key: Key, moment: Moment, spared: Collection[Key]) -> tuple[Key | None, bool]:
        """Let the policy decide about ``key``; return who went, and whether it stays."""
        candidates = Leaving(self.resident, self._ahead, spared)
        goes = self.policy.place(key, candidates, self.capacity - len(self.resident), moment)
        if goes == key:
            return None, False
        if goes is not None:
            del self.resident[goes]
            self.policy.drop(goes)
        self.resident[key] = None
        self.policy.admit(key, moment)
        return goes, True
