"""Interpolated Kneser-Ney 3-grams: what a model of text must beat to have learnt more than neighbouring symbols.

Kneser and Ney 1995 in the interpolated form of Chen and Goodman 1998: one discount per order, n1 / (n1 + 2 n2), and
lower orders that count in how many contexts a symbol occurs. The lowest order falls back to the uniform distribution.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

ORDER = 3


@dataclass
class _Level:
    """One order: counts of symbols after contexts, and what a context's mass and number of kinds are."""

    count: Counter[tuple[Hashable, ...]]
    mass: Counter[tuple[Hashable, ...]] = field(default_factory=Counter)
    kinds: Counter[tuple[Hashable, ...]] = field(default_factory=Counter)
    discount: float = 0.0

    def __post_init__(self) -> None:
        for gram, count in self.count.items():
            self.mass[gram[:-1]] += count
            self.kinds[gram[:-1]] += 1
        of = Counter(self.count.values())
        self.discount = of[1] / (of[1] + 2 * of[2]) if of[1] else 0.5


class Trigrams:
    """A 3-gram model of a sequence of symbols out of ``vocabulary`` many."""

    def __init__(self, symbols: Sequence[int], vocabulary: int) -> None:
        self.vocabulary = vocabulary
        grams: Counter[tuple[Hashable, ...]] = Counter(zip(symbols, symbols[1:], symbols[2:], strict=False))
        self._levels = [_Level(grams)]
        for _ in range(ORDER - 1):
            self._levels.insert(0, _Level(Counter(gram[1:] for gram in self._levels[0].count)))

    def probability(self, symbol: int, context: Sequence[int]) -> float:
        """Return the probability of ``symbol`` after ``context``, whose last two symbols count."""
        result = 1.0 / self.vocabulary
        known = tuple(context[-(ORDER - 1) :])
        for length, level in enumerate(self._levels):
            if length > len(known):
                break
            before = known[len(known) - length :]
            mass = level.mass[before]
            if mass:
                own = max(level.count[(*before, symbol)] - level.discount, 0.0)
                result = (own + level.discount * level.kinds[before] * result) / mass
        return result

    def bits(self, symbols: Sequence[int], first: int = 1) -> float:
        """Return the bits of ``symbols[first:]``, each given what is before it."""
        places = range(first, len(symbols))
        return -sum(math.log2(self.probability(symbols[i], symbols[max(0, i - 2) : i])) for i in places)
