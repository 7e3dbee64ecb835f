"""How long a run takes on two tiers, from its events and measured costs: a model of the store, without weights.

One thread computes, ``readers`` threads read, as in the store. At each access the compute thread hands out the demand
reads, then those ahead of demand, computes the experts that are there, then the missing ones in their order, each as
soon as it has come. Readers take demand before prefetch, each in the order of asking; a read needs a free buffer: slots
that nobody holds, and ``staging`` ones besides. Who is still to be computed holds its buffer until then. What a layer
defers is computed when the next one begins. Imports no torch.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from .access import Access, Event, Key
from .costs import Curve
from .simulate import Simulated, read_bytes


@dataclass(frozen=True)
class TierCosts:
    """Seconds that things take, and the bytes that are read.

    ``other``: everything of a layer but its routed experts, at each access. ``fast``, ``in_place`` and ``low`` (each
    over the tokens of an expert): computing it from its slot, where it lies, from a copy of few bits. ``load``: reading
    bytes from the slow tier, over the bytes, by one reader alone.
    """

    other: float
    fast: Curve
    load: Curve
    slab_bytes: int
    readers: int = 1
    staging: int = 2
    in_place: Curve | None = None
    low: Curve | None = None
    low_bytes: int = 0

    def __post_init__(self) -> None:
        if self.readers < 1 or self.staging < 1:
            raise ValueError(f"readers={self.readers} and staging={self.staging} must be at least 1.")

    def compute(self, event: Event, tokens: int) -> float:
        """Return the seconds that computing an expert of ``tokens`` tokens takes."""
        curve = {"in_place": self.in_place, "low": self.low}.get(event.how, self.fast)
        if curve is None:
            raise ValueError(f"events are computed '{event.how}', of which no costs are given.")
        return curve(tokens)

    def read(self, event: Event) -> float:
        """Return the seconds that reading what an event brings takes."""
        return self.load(read_bytes(event, self.slab_bytes, self.low_bytes))


@dataclass(frozen=True)
class Spent:
    """The seconds of an access or of a step, those of waiting among them, and how many reads ahead came late."""

    step: int
    seconds: float
    stall: float
    late: int


def per_step(accesses: Iterable[Spent]) -> list[Spent]:
    """Return the sums over each step, in order."""
    steps = []
    for step, group in groupby(accesses, key=lambda access: access.step):
        times = list(group)
        seconds, stall = sum(one.seconds for one in times), sum(one.stall for one in times)
        steps.append(Spent(step, seconds, stall, sum(one.late for one in times)))
    return steps


@dataclass(frozen=True)
class _Deferred:
    """An expert to be computed later: ``there`` is when it has come, None where no buffer was free for its read.

    ``passing`` gives its buffer back.
    """

    there: float | None
    read: float
    seconds: float
    passing: bool


@dataclass
class _Tiers:
    """Readers and buffers, each as the time from which it is free, and who is under way."""

    costs: TierCosts
    readers: list[float]
    buffers: list[float]
    arrival: dict[Key, float] = field(default_factory=dict)  # read ahead, begun and not used yet
    waiting: dict[Key, float] = field(default_factory=dict)  # to be read ahead, with when that was asked for
    deferred: list[_Deferred] = field(default_factory=list)  # to be computed when the next layer begins

    def load(self, seconds: float, asked: float) -> float:
        """Read at the first reader and into the first buffer that are free; return when it is there."""
        begins = max(asked, heapq.heappop(self.readers), heapq.heappop(self.buffers))
        heapq.heappush(self.readers, begins + seconds)
        return begins + seconds

    def free(self, when: float) -> None:
        """Give a buffer back."""
        heapq.heappush(self.buffers, when)

    def run_ahead(self, until: float) -> None:
        """Begin the waiting reads for which a reader and a buffer are free before ``until``, the first ones first."""
        for key, asked in list(self.waiting.items()):
            if max(asked, self.readers[0], self.buffers[0]) >= until:
                return
            del self.waiting[key]
            self.arrival[key] = self.load(self.costs.load(self.costs.slab_bytes), asked)

    def there(self, key: Key, now: float) -> float:
        """Return when an expert of the cache is there; one whose read ahead has not begun is read at once."""
        if key in self.waiting:
            del self.waiting[key]
            return self.load(self.costs.load(self.costs.slab_bytes), now)
        return self.arrival.pop(key, now)

    def leave(self, key: Key, now: float) -> None:
        """Free the buffer of an expert that went; one whose read has not begun has none."""
        if self.waiting.pop(key, None) is None:
            self.free(max(now, self.arrival.pop(key, now)))


def predict(accesses: Sequence[Access], simulated: Simulated, costs: TierCosts) -> list[Spent]:
    """Return the time of each access.

    Reads do not slow each other down, nor do they slow computing: where they do (one disk, few cores), ``load`` must be
    measured so, or the prediction is too good.
    """
    empty = simulated.capacity - len(simulated.initial) + costs.staging
    tiers = _Tiers(costs, [0.0] * costs.readers, [0.0] * empty)
    clock, times, last = 0.0, [], max((access.layer for access in accesses), default=0)
    for access, events in zip(accesses, simulated.events, strict=True):
        ended, stall, late = _serve(access, events, tiers, clock, access.layer == last)
        times.append(Spent(access.step, ended - clock, stall, late))
        clock = ended
    return times


def _serve(
    access: Access, events: Sequence[Event], tiers: _Tiers, began: float, last: bool
) -> tuple[float, float, int]:
    """Return when an access ends, how long was waited, and how many reads ahead came late.

    Nothing is deferred by the ``last`` layer of a step.
    """
    clock, stall = _settle(tiers, began + tiers.costs.other)
    asked, late = clock, 0
    tiers.run_ahead(asked)
    tokens = dict(zip(access.keys, access.tokens, strict=True))
    gone = {event.evicted for event in events if event.evicted is not None}
    uses = [event for event in events if event.kind != "prefetch"]
    for key in sorted(gone - {event.key for event in uses}):
        tiers.leave(key, asked)
    for event in sorted(uses, key=lambda event: event.how == "deferred" and not last):
        passing = event.kind == "miss" and (event.how == "low" or not event.kept)
        freed, seconds = passing or event.key in gone, tiers.costs.compute(event, tokens[event.key])
        if event.how == "deferred" and not last:
            read = tiers.costs.read(event)
            tiers.deferred.append(_Deferred(tiers.load(read, asked) if tiers.buffers else None, read, seconds, freed))
            continue
        if event.kind == "miss":
            there = asked if event.how == "in_place" else tiers.load(tiers.costs.read(event), asked)
        else:
            there = tiers.there(event.key, asked)
            late += there > clock
        stall += max(0.0, there - clock)
        clock = max(clock, there) + seconds
        if event.how != "in_place" and freed:
            tiers.free(clock)
    tiers.waiting.update({event.key: asked for event in events if event.kind == "prefetch"})
    return clock, stall, late


def _settle(tiers: _Tiers, clock: float) -> tuple[float, float]:
    """Compute what the layer before deferred; return when that ends and how long was waited."""
    stall = 0.0
    for one in tiers.deferred:
        there = tiers.load(one.read, clock) if one.there is None else one.there
        stall += max(0.0, there - clock)
        clock = max(clock, there) + one.seconds
        if one.passing:
            tiers.free(clock)
    tiers.deferred.clear()
    return clock, stall


def two_tier(accesses: Sequence[Access], simulated: Simulated, costs: TierCosts) -> list[Spent]:
    """Return the closed form of each step: over its layers, ``other`` + max(computing, reading on demand / readers).

    Reading and computing of a layer overlap wholly; reads ahead cost nothing. Without reads ahead it is a lower bound
    of ``predict``.
    """
    times = []
    for access, events in zip(accesses, simulated.events, strict=True):
        tokens = dict(zip(access.keys, access.tokens, strict=True))
        uses = [event for event in events if event.kind != "prefetch"]
        computing = sum(costs.compute(event, tokens[event.key]) for event in uses)
        reading = sum(costs.read(event) for event in uses if event.kind == "miss") / costs.readers
        stall = max(0.0, reading - computing)
        times.append(Spent(access.step, costs.other + computing + stall, stall, 0))
    return per_step(times)
