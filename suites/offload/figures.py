"""The figures of suite ``offload``: what a cache did over the steps, what that cost, how far from the best it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...backends.offload.access import Event
from ...backends.offload.cache import Tally
from ...backends.offload.names import make_policy
from ...backends.offload.simulate import Simulated, optimality, simulate
from ...contracts import Metric
from .recording import Recording


@dataclass(frozen=True)
class Turn:
    """What one turn cost: a ledger entry an access, without those of the prompt, and the time of each step."""

    ledger: Sequence[Any]
    step_ns: Sequence[int]


def tally_of(events: Sequence[Sequence[Event]], skipped: int) -> Tally:
    """Return the counts of all accesses but the first ``skipped``, those of the prompt."""
    tally = Tally()
    for access in events[skipped:]:
        for event in access:
            tally.count(event)
    return tally


def hit_rate(recording: Recording, policy: str, capacity: int) -> float:
    """Return the simulated hit rate over the steps of a policy that brings experts on demand."""
    done = simulate(recording.accesses, make_policy(policy), capacity, recording.layout)
    return tally_of(done.events, recording.prompt_accesses).hit_rate or 0.0


def cache_figures(recording: Recording, run: Simulated) -> list[Metric]:
    """Return hits, what was brought ahead, and ``optimality``: the share of the gap between LRU and Belady closed."""
    events, capacity = run.events, run.capacity
    tally = tally_of(events, recording.prompt_accesses)
    lru, belady = (hit_rate(recording, name, capacity) for name in ("lru", "belady"))
    rate, n = tally.hit_rate, tally.requests
    best = None if rate is None else optimality(rate, lru, belady)
    evicted = sum(event.evicted is not None for access in events[recording.prompt_accesses :] for event in access)
    return [
        Metric("hit_rate", rate, "1", n=n),
        Metric("lru_hit_rate", lru, "1", n=n),
        Metric("belady_hit_rate", belady, "1", n=n),
        Metric("optimality", best, "1", n=n),
        Metric("experts_per_step", n / recording.steps, "1", n=recording.steps),
        Metric("misses_per_step", tally.misses / recording.steps, "1", n=recording.steps),
        Metric("evictions_per_step", evicted / recording.steps, "1", n=recording.steps),
        Metric("prefetched_per_step", tally.prefetched / recording.steps, "1", n=recording.steps),
        Metric("prefetch_precision", tally.precision, "1", n=tally.prefetched),
        Metric("prefetch_recall", tally.recall if tally.prefetched else None, "1", n=tally.covered + tally.misses),
        Metric("capacity_experts", float(capacity), "1"),
        Metric("covered_per_step", tally.covered / recording.steps, "1", n=recording.steps),
    ]


def turn_figures(turns: Sequence[Turn]) -> list[Metric]:
    """Return means over the steps of all turns; None where there was no turn."""
    steps = sum(len(turn.step_ns) for turn in turns)

    def mean(value: Callable[[Any], float]) -> float | None:
        return sum(value(entry) for turn in turns for entry in turn.ledger) / steps if steps else None

    return [
        Metric("stall_per_step", mean(lambda entry: entry.stall_ns), "ns", n=steps),
        Metric("bytes_per_step", mean(lambda entry: entry.bytes_read), "byte", n=steps),
        Metric("read_time_per_step", mean(lambda entry: entry.read_ns), "ns", n=steps),
        Metric("late_per_step", mean(lambda entry: entry.late), "1", n=steps),
        Metric("step_time", sum(sum(turn.step_ns) for turn in turns) / steps if steps else None, "ns", n=steps),
    ]
