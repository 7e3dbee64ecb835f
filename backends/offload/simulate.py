"""A cache driven by accesses alone: what it would do, without weights and without time. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .access import Access, Event, Future, Key, Layout
from .cache import Cache, Execution, Prefetcher, Tally
from .policies.base import CachePolicy


@dataclass(frozen=True)
class Simulated:
    """What a cache did: its counts, and its events, one list an access; ``initial`` were there before."""

    tally: Tally
    events: tuple[tuple[Event, ...], ...]
    capacity: int
    initial: frozenset[Key]

    def bytes_read(self, slab_bytes: int, low_bytes: int = 0) -> int:
        """Return the bytes that came from the slow tier, with ``slab_bytes`` an expert and ``low_bytes`` a copy of few
        bits; what is in the cache from the start is not counted."""
        return sum(read_bytes(event, slab_bytes, low_bytes) for events in self.events for event in events)


def read_bytes(event: Event, slab_bytes: int, low_bytes: int = 0) -> int:
    """Return the bytes that an event brings from the slow tier."""
    if event.kind in ("hit", "covered") or event.how == "in_place":
        return 0
    return low_bytes if event.how == "low" else slab_bytes


def simulate(
    accesses: Iterable[Access],
    policy: CachePolicy,
    capacity: int,
    layout: Layout,
    prefetcher: Prefetcher | None = None,
    execution: Execution | None = None,
) -> Simulated:
    """Return what a cache of ``capacity`` slots does with the accesses; those who need the future are given it.

    Policies, prefetchers and executions remember what they saw: give new ones to each simulation.
    """
    future = Future(accesses)
    cache = Cache(policy, capacity, layout, prefetcher, future, execution)
    initial = frozenset(cache.resident)
    events = tuple(tuple(cache.access(access)) for access in future.accesses)
    return Simulated(cache.tally, events, capacity, initial)


def sweep(
    accesses: Sequence[Access],
    make_policy: Callable[[], CachePolicy],
    capacities: Iterable[int],
    layout: Layout,
    make_prefetcher: Callable[[], Prefetcher | None] = lambda: None,
) -> dict[int, Simulated]:
    """Return what caches of several capacities do, each with a policy and a prefetcher of its own."""
    return {capacity: simulate(accesses, make_policy(), capacity, layout, make_prefetcher()) for capacity in capacities}


def optimality(hit_rate: float, lru: float, belady: float) -> float | None:
    """Return the share of the gap between LRU and Belady that a policy closes; None where there is no gap.

    At most 1 for what is brought on demand; below 0 for a policy that is worse than LRU.
    """
    return (hit_rate - lru) / (belady - lru) if belady > lru else None
