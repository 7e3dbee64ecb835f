"""Placements: who is in the cache is chosen before the run and never changes; everybody else comes and goes at once."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from .base import Access, Key, Layout, Moment, Ranked


def popularity(accesses: Iterable[Access]) -> dict[Key, float]:
    """Return how many tokens each expert had: the profile of ``Static``, of a run beforehand."""
    counts: dict[Key, float] = {}
    for access in accesses:
        for key, tokens in zip(access.keys, access.tokens, strict=True):
            counts[key] = counts.get(key, 0) + tokens
    return counts


class Placement(Ranked):
    """Keeps the ``capacity`` experts that ``order`` puts first."""

    def order(self, layout: Layout, capacity: int) -> Iterable[Key]:
        """Return the experts that may stay, the most wanted first."""
        raise NotImplementedError

    def start(self, layout: Layout, capacity: int) -> Iterable[Key]:
        """Choose who stays."""
        return list(self.order(layout, capacity))[:capacity]

    def place(self, incoming: Key, candidates: Collection[Key], free: int, moment: Moment) -> Key | None:
        """Keep nobody else, even where slots are free."""
        return incoming

    def worth(self, key: Key, moment: Moment) -> tuple[float, ...]:
        """Return the same for all: nobody is ever compared."""
        return ()


class Static(Placement):
    """The most popular experts of all layers, as Fiddler places them and KTransformers does by a profile.

    ``popularity`` is how often each expert was asked for in a run beforehand. Without it, each layer keeps as many
    experts as any other, those with the lowest ids (KTransformers: uniform).
    """

    def __init__(self, popularity: Mapping[Key, float] | None = None) -> None:
        self.popularity = popularity

    def order(self, layout: Layout, capacity: int) -> Iterable[Key]:
        """Order by popularity, then by id, so that layers take turns."""
        popularity = self.popularity or {}
        return sorted(layout.keys(), key=lambda key: (-popularity.get(key, 0), key[1], key[0]))


class WholeLayers(Placement):
    """Keeps layers, each with all its experts or with none, as users of llama.cpp place them."""

    def slow(self, layout: Layout, capacity: int) -> Collection[int]:
        """Return the layers that stay in the slow tier."""
        raise NotImplementedError

    def order(self, layout: Layout, capacity: int) -> Iterable[Key]:
        """Return all experts of as many other layers as fit, the first ones first."""
        slow = self.slow(layout, capacity)
        fast = [layer for layer in layout.layers if layer not in slow][: capacity // layout.experts]
        return [(layer, expert) for layer in fast for expert in range(layout.experts)]


class CpuMoe(WholeLayers):
    """Leaves the experts of the first ``count`` decoder layers in the slow tier, as llama.cpp's ``--n-cpu-moe`` does.

    Layers are counted by their decoder index, those without experts included. Without ``count``, it is the least with
    which all later layers fit: what users search for by hand.
    """

    def __init__(self, count: int | None = None) -> None:
        if count is not None and count < 0:
            raise ValueError(f"count={count} must be at least 0 layers.")
        self.count = count

    def slow(self, layout: Layout, capacity: int) -> Collection[int]:
        """Return the first layers."""
        if self.count is not None:
            return [layer for layer in layout.layers if layer < self.count]
        return layout.layers[: max(0, len(layout.layers) - capacity // layout.experts)]


class Pattern(WholeLayers):
    """Leaves layers in the slow tier whose names match, as ``--override-tensor PATTERN=CPU`` of llama.cpp does.

    A layer has three names, ``blk.LAYER.ffn_gate_exps.weight``, ``..up..`` and ``..down..``; the pattern is searched
    in them. llama.cpp places the three apart; here one that matches leaves the whole layer in the slow tier.
    """

    def __init__(self, pattern: str) -> None:
        try:
            self.pattern = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"'{pattern}' is not a regular expression ({error}).") from error

    def slow(self, layout: Layout, capacity: int) -> Collection[int]:
        """Return the layers that match."""
        parts = ("gate", "up", "down")
        return [
            layer
            for layer in layout.layers
            if any(self.pattern.search(f"blk.{layer}.ffn_{part}_exps.weight") for part in parts)
        ]
