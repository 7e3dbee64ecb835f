"""What becomes of missing experts: brought, computed in place, brought in few bits, deferred. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from .access import How, Key, Moment
from .costs import ExpertCosts
from .importance import share_before

Objective = Literal["sum", "max"]


def best_threshold(cold: Sequence[float], hot: Sequence[float], base: float = 0.0) -> int:
    """Return how many of the first experts belong on the cold side, so that the slower side is done the soonest.

    ``cold`` and ``hot`` are seconds of each expert on either side, of experts in ascending number of tokens; ``base``
    is what the hot side has to do besides. Of equal choices, the fewest on the cold side. Where an expert is the same
    time on the hot side whatever its tokens, and the cold side's time grows with them, no subset beats the best
    threshold: exchanging a cold expert for a hot one of fewer tokens shortens the cold side and leaves the hot one.
    """
    on_cold, on_hot = 0.0, base + sum(hot)
    best, shortest = 0, on_hot
    for count, (seconds, saved) in enumerate(zip(cold, hot, strict=True), 1):
        on_cold, on_hot = on_cold + seconds, on_hot - saved
        if max(on_cold, on_hot) < shortest:
            best, shortest = count, max(on_cold, on_hot)
    return best


def by_tokens(keys: Sequence[Key], moment: Moment) -> list[tuple[int, Key]]:
    """Return (tokens, key) in ascending order."""
    tokens = dict(zip(moment.access.keys, moment.access.tokens, strict=True))
    return sorted((tokens[key], key) for key in keys)


class Fiddler:
    """Fiddler's choice (arXiv 2402.07033): an expert is computed where it lies if that takes less than to bring it.

    A missing expert of n tokens costs ``in_place(n)`` there, and the constant ``load`` if it is brought, since the fast
    tier computes in no time beside that; one that is there costs nothing. ``sum`` is what the authors' code minimises:
    each expert by itself. ``max``, of which its comments speak, lets both sides work at the same time and minimises the
    slower one. Both are exact: see ``best_threshold`` for the second.
    """

    def __init__(self, costs: ExpertCosts, objective: Objective = "sum") -> None:
        self.costs, self.objective = costs, objective

    def decide(self, missing: Sequence[Key], moment: Moment) -> Mapping[Key, How]:
        """Return who is computed in place."""
        ranked = by_tokens(missing, moment)
        seconds = [self.costs.in_place(tokens) for tokens, _ in ranked]
        if self.objective == "sum":
            chosen = [key for (_, key), cold in zip(ranked, seconds, strict=True) if cold < self.costs.load]
        else:
            count = best_threshold(seconds, [self.costs.load] * len(ranked))
            chosen = [key for _, key in ranked[:count]]
        return dict.fromkeys(chosen, "in_place")


class InPlace:
    """Every missing expert is computed where it lies, and nothing is ever brought: the other extreme of fetching."""

    def __init__(self, costs: ExpertCosts) -> None:
        self.costs = costs

    def decide(self, missing: Sequence[Key], moment: Moment) -> Mapping[Key, How]:
        """Return all of them."""
        return dict.fromkeys(missing, "in_place")


class DuplexSplit:
    """Duplex' split (arXiv 2409.01141) by operations per byte, that is by tokens: few stay, many go to the fast side.

    All experts of an access take part: those that are there on the fast side, missing ones there after ``load``. The
    number of tokens that divides the missing ones minimises the slower of both sums. Not exact over all subsets.
    """

    def __init__(self, costs: ExpertCosts) -> None:
        self.costs = costs

    def decide(self, missing: Sequence[Key], moment: Moment) -> Mapping[Key, How]:
        """Return who is computed in place."""
        costs, ranked = self.costs, by_tokens(missing, moment)
        here = by_tokens([key for key in moment.access.keys if key not in set(missing)], moment)
        cold = [costs.in_place(tokens) for tokens, _ in ranked]
        hot = [costs.load + costs.fast(tokens) for tokens, _ in ranked]
        count = best_threshold(cold, hot, sum(costs.fast(tokens) for tokens, _ in here))
        return dict.fromkeys((key for _, key in ranked[:count]), "in_place")


class LowBits:
    """HOBBIT's fetch (arXiv 2411.01433): missing experts of little importance come as a copy of few bits.

    Those are the ones before which more important experts have more than ``threshold`` of the access's gate weights.
    The paper leaves out experts beyond a second threshold (0.9); here none is left out, so that the distance of the
    output comes from bits alone. With ``threshold`` 1 every expert is fetched in full.
    """

    def __init__(self, threshold: float = 0.6) -> None:
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold} must lie in 0..1.")
        self.threshold = threshold

    def decide(self, missing: Sequence[Key], moment: Moment) -> Mapping[Key, How]:
        """Return who comes in few bits."""
        before = share_before(moment.access)
        return {key: "low" for key in missing if before[key[1]] > self.threshold}


class Deferral:
    """KTransformers' deferral (SOSP 2025): missing experts of the least weight, whose output comes one layer later.

    At most ``count`` of an access, and always all but one of its experts at most, so that the layer has an output of
    its own. Nothing is deferred at the last layer, after which nothing comes.
    """

    def __init__(self, count: int = 2) -> None:
        if count < 0:
            raise ValueError(f"count={count} must be at least 0 experts.")
        self.count = count

    def decide(self, missing: Sequence[Key], moment: Moment) -> Mapping[Key, How]:
        """Return who is deferred."""
        access = moment.access
        if access.layer == moment.layout.layers[-1]:
            return {}
        before = share_before(access)
        ranked = sorted(missing, key=lambda key: (-before[key[1]], -key[1]))
        return dict.fromkeys(ranked[: min(self.count, len(access.experts) - 1)], "deferred")
