"""How important the experts of an access are: HOBBIT's ranking by gate weights (arXiv 2411.01433). Imports no torch."""

from __future__ import annotations

from .access import Access


def share_before(access: Access) -> dict[int, float]:
    """Return, for each expert, the share of the gate weights that the more important ones have: 0 for the first.

    Experts are ranked by the magnitude of their summed gate weight, ties by id; the share lies in 0..1. Where all
    weights are 0 nobody is unimportant: every share is 0.
    """
    ranked = sorted(zip(access.experts, map(abs, access.weights), strict=True), key=lambda one: (-one[1], one[0]))
    before, sums = 0.0, []
    for _, weight in ranked:
        sums.append(before)
        before += weight
    return {expert: total / before if before else 0.0 for (expert, _), total in zip(ranked, sums, strict=True)}
