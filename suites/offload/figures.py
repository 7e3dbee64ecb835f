"""The figures of suite ``offload``: what a cache did over the steps, what that cost, how far from the best it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ...backends.offload.access import Access, Event, Layout
from ...backends.offload.cache import Tally
from ...backends.offload.names import make_policy
from ...backends.offload.simulate import Simulated, optimality, simulate
from ...contracts import Metric
from .layers import Layers
from .recording import Recorder, Recording


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


def misses(accesses: Sequence[Access], skipped: int, policy: str, capacity: int, layout: Layout) -> Tally:
    """Return the simulated counts of a policy that brings experts on demand, without the first ``skipped`` accesses."""
    return tally_of(simulate(accesses, make_policy(policy), capacity, layout).events, skipped)


def cache_figures(recording: Recording, run: Simulated) -> list[Metric]:
    """Return hits, what was brought ahead, and ``optimality``: the share of the gap between LRU and Belady closed."""
    events, capacity = run.events, run.capacity
    tally = tally_of(events, recording.prompt_accesses)
    accesses, skipped = recording.accesses, recording.prompt_accesses
    lru, belady = (
        misses(accesses, skipped, name, capacity, recording.layout).hit_rate or 0.0 for name in ("lru", "belady")
    )
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


def gate_figures(recording: Recording) -> list[Metric]:
    """Return ``gate_recall``: the share of a layer's experts that the gate named when it read the layer before; and
    ``gate_chance``, what naming as many by chance would give. Nothing where gates were not asked."""
    found, asked, chance = 0, 0, 0.0
    decoded = recording.accesses[recording.prompt_accesses :]
    for before, access in pairwise(decoded):
        hinted = {key for key, _ in before.hints if key[0] == access.layer}
        if hinted and before.step == access.step:
            found += sum(key in hinted for key in access.keys)
            asked += len(access.keys)
            chance += len(access.keys) * len(hinted) / recording.layout.experts
    if not asked:
        return []
    return [Metric("gate_recall", found / asked, "1", n=asked), Metric("gate_chance", chance / asked, "1", n=asked)]


def order_figures(recording: Recording, layers: Layers, policy: str, capacity: int) -> list[Metric]:
    """Return ``by_token_misses_per_step``: what a demand policy misses if layers compute token by token (M3ViT).

    Nothing for one token a step, or where they do so already.
    """
    if layers.by_token or max(one.num_tokens for one in recording.routings[-1].values()) < 2:
        return []
    recorder = Recorder()
    for call in recording.routings:
        for layer, routing in call.items():
            recorder.look(layer, routing, [routing.part(token, token + 1) for token in range(routing.num_tokens)])
    own = sum(routing.num_tokens for call in recording.routings[-recording.steps :] for routing in call.values())
    tally = misses(recorder.accesses, len(recorder.accesses) - own, policy, capacity, recording.layout)
    return [Metric("by_token_misses_per_step", tally.misses / recording.steps, "1", n=recording.steps)]


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
