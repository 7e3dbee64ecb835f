"""What a trace says of itself: popularity, reuse, what caches make of it, how good its hints are. Imports no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...backends.offload.access import Access, Key, Layout
from ...backends.offload.policies.lookahead import Belady
from ...backends.offload.policies.recency import LRU
from ...backends.offload.simulate import simulate


@dataclass(frozen=True)
class Popularity:
    """How requests are spread; a request is an expert that an access asks for, however many tokens it has.

    ``busiest_share`` is the share of requests that go to the ``busiest`` most asked for of all experts, a tenth of
    them. ``entropy`` is that of the requests over a layer's experts, as a part of log2(experts), mean over layers.
    """

    requests: int
    asked: int
    busiest: int
    busiest_share: float
    entropy: float


@dataclass(frozen=True)
class Reuse:
    """How soon experts are asked for again.

    ``kept`` is the share of a layer's experts that it asked for at its step before, too, mean over accesses (None where
    there is one step). ``first`` is the share of requests for an expert that was never asked for before. A
    ``distance`` is the number of other experts, of all layers, that are asked for between two requests of one: an LRU
    that is filled request by request hits where it has more slots than that.
    """

    kept: float | None
    first: float
    distances: tuple[int, ...]

    def quantile(self, q: float) -> int | None:
        """Return the smallest distance that a part ``q`` of all does not exceed; None where nothing is reused."""
        return self.distances[max(math.ceil(q * len(self.distances)) - 1, 0)] if self.distances else None


@dataclass(frozen=True)
class HitRates:
    """What a cache of ``slots`` experts makes of the trace, filled on demand; nobody beats ``belady``."""

    slots: int
    lru: float
    belady: float


@dataclass(frozen=True)
class Guesses:
    """How good hints are, over the accesses that they speak of: the share of requests that had been expected, and the
    share of what was expected that was asked for."""

    recall: float
    precision: float
    accesses: int


def popularity(accesses: Sequence[Access], layout: Layout) -> Popularity:
    """Return how requests are spread over all experts of ``layout``."""
    counts = Counter(key for access in accesses for key in access.keys)
    requests = counts.total()
    busiest = max(1, round(layout.size / 10))
    share = sum(count for _, count in counts.most_common(busiest)) / requests
    by_layer: dict[int, list[int]] = {}
    for (layer, _), count in counts.items():
        by_layer.setdefault(layer, []).append(count)
    entropies = [_entropy(own, layout.experts) for own in by_layer.values()]
    return Popularity(requests, len(counts), busiest, share, sum(entropies) / len(entropies))


def _entropy(counts: Sequence[int], experts: int) -> float:
    """Return the entropy of a layer's requests as a part of the largest; 1 where there is but one expert."""
    total = sum(counts)
    bits = -sum(count / total * math.log2(count / total) for count in counts)
    return bits / math.log2(experts) if experts > 1 else 1.0


def reuse(accesses: Sequence[Access]) -> Reuse:
    """Return how soon experts are asked for again."""
    before: dict[int, set[int]] = {}
    kept = []
    for access in accesses:
        if access.layer in before:
            kept.append(len(before[access.layer].intersection(access.experts)) / len(access.experts))
        before[access.layer] = set(access.experts)
    requests = [key for access in accesses for key in access.keys]
    distances = sorted(_distances(requests))
    first = len(set(requests)) / len(requests)
    return Reuse(sum(kept) / len(kept) if kept else None, first, tuple(distances))


def _distances(requests: Sequence[Key]) -> Iterator[int]:
    """Yield how many other keys lie between two requests of one, for each that has one before.

    A Fenwick tree holds a 1 at the latest request of every key, so that those after a place can be counted in log n.
    """
    tree = [0] * (len(requests) + 1)
    latest: dict[Key, int] = {}
    for place, key in enumerate(requests, 1):
        if key in latest:
            yield len(latest) - _sum_to(tree, latest[key])
            _add(tree, latest[key], -1)
        _add(tree, place, 1)
        latest[key] = place


def _sum_to(tree: Sequence[int], place: int) -> int:
    total = 0
    while place:
        total += tree[place]
        place &= place - 1
    return total


def _add(tree: list[int], place: int, value: int) -> None:
    while place < len(tree):
        tree[place] += value
        place += place & -place


def hit_rates(accesses: Sequence[Access], layout: Layout, slots: int) -> HitRates:
    """Return what LRU and Belady's policy hit in a cache of ``slots`` experts."""
    lru, belady = (simulate(accesses, policy, slots, layout).tally.hit_rate or 0.0 for policy in (LRU(), Belady()))
    return HitRates(slots, lru, belady)


def guesses(accesses: Sequence[Access]) -> Guesses | None:
    """Return how good the hints are; None where there are none.

    Hints that an access carries speak of the next layer of the same step.
    """
    expected: dict[tuple[int, int], set[int]] = {}
    for access in accesses:
        for (layer, expert), _ in access.hints:
            expected.setdefault((access.step, layer), set()).add(expert)
    judged = [access for access in accesses if (access.step, access.layer) in expected]
    if not judged:
        return None
    found = sum(len(expected[access.step, access.layer].intersection(access.experts)) for access in judged)
    asked, told = sum(len(access.experts) for access in judged), sum(map(len, expected.values()))
    return Guesses(found / asked, found / told, len(judged))
