"""What layers ask for, what a cache answers, and what is known of the future. Imports no torch.

An access is what one MoE layer asks for at one step; accesses are counted in the order in which they come, all layers
together: that count is the clock of every policy.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

Key = tuple[int, int]
"""(decoder layer, expert id)."""


@dataclass(frozen=True)
class Access:
    """What one layer asks for at one step.

    ``experts`` are distinct and ascending; ``tokens`` says how many tokens each has, ``weights`` the sum of their gate
    weights. ``hints`` are experts that the driver of the model expects to be asked for next, each with a priority (the
    higher, the surer), such as what the next layer's gate says of this layer's input.
    """

    step: int
    layer: int
    experts: tuple[int, ...]
    tokens: tuple[int, ...]
    weights: tuple[float, ...]
    hints: tuple[tuple[Key, float], ...] = ()

    def __post_init__(self) -> None:
        if not len(self.experts) == len(self.tokens) == len(self.weights):
            raise ValueError("experts, tokens and weights of an access must be of one length.")
        if any(a >= b for a, b in zip(self.experts, self.experts[1:], strict=False)):
            raise ValueError(f"experts {self.experts} of an access must be distinct and ascending.")

    @property
    def keys(self) -> tuple[Key, ...]:
        """The keys asked for."""
        return tuple((self.layer, expert) for expert in self.experts)


Kind = Literal["hit", "covered", "miss", "prefetch"]
"""``covered``: the first use of what was brought before it was asked for; whether it was there in time, clocks say."""


How = Literal["fetch", "in_place", "low", "deferred"]
"""What becomes of an expert that is missing: it is brought; computed where it lies; brought as a copy of few bits; or
brought, and its output added one layer later."""


@dataclass(frozen=True)
class Event:
    """One thing that a cache did. ``evicted`` made room; ``kept`` is false of what was used and not kept.

    ``how`` is what became of a miss; for every other kind it is ``fetch``.
    """

    kind: Kind
    key: Key
    evicted: Key | None = None
    kept: bool = True
    how: How = "fetch"


@dataclass(frozen=True)
class Layout:
    """Which experts there are: decoder indices of the layers in order, and the expert ids of each of them."""

    layers: tuple[int, ...]
    experts: int

    @property
    def size(self) -> int:
        """Number of all experts."""
        return len(self.layers) * self.experts

    def keys(self) -> list[Key]:
        """Return every key, layer by layer."""
        return [(layer, expert) for layer in self.layers for expert in range(self.experts)]


def slots_of(share: float, experts: int) -> int:
    """Return how many slots a share of all experts is, rounded down: 29 for 0.29 of 100, whatever floats say."""
    return math.floor(share * experts + 1e-9)


class Future:
    """The accesses of a whole run, known beforehand: what only a bound, an oracle or a pre-gated model may look at."""

    def __init__(self, accesses: Iterable[Access]) -> None:
        self.accesses: Sequence[Access] = tuple(accesses)
        self._uses: dict[Key, list[int]] = {}
        for place, access in enumerate(self.accesses):
            for key in access.keys:
                self._uses.setdefault(key, []).append(place)

    def next_use(self, key: Key, now: int) -> int | None:
        """Return when ``key`` is asked for after access ``now``; None where it never is."""
        uses = self._uses.get(key, [])
        place = bisect_right(uses, now)
        return uses[place] if place < len(uses) else None

    def after(self, now: int, count: int) -> Sequence[Access]:
        """Return the ``count`` accesses after access ``now``, fewer at the end."""
        return self.accesses[now + 1 : now + 1 + count]


@dataclass(frozen=True)
class Moment:
    """When a decision is made: at access number ``now``; ``future`` is None for those who may not know it."""

    now: int
    access: Access
    layout: Layout
    future: Future | None = field(default=None, compare=False)

    @property
    def foreseen(self) -> Future:
        """The accesses to come; ValueError for one who did not say ``needs_future`` and looks at them."""
        if self.future is None:
            raise ValueError("the accesses to come are not known here; set needs_future.")
        return self.future
