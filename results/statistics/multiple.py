"""Many answers at once: how often chance alone would give them."""

from __future__ import annotations

from collections.abc import Sequence


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """Return the q value of each p value: those of at most q are expected to hold a share q of false ones at most.

    Benjamini & Hochberg (1995), for independent or positively dependent tests.
    """
    if any(not 0 <= one <= 1 for one in p):
        raise ValueError(f"a p value lies between 0 and 1: {min(p)} to {max(p)} do not.")
    order = sorted(range(len(p)), key=lambda index: p[index], reverse=True)
    q_values, least = [1.0] * len(p), 1.0
    for place, index in enumerate(order):
        least = min(least, p[index] * len(p) / (len(p) - place))
        q_values[index] = least
    return q_values
