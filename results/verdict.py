"""What an interval of a ratio says; only pairs measured in the same sitting have one, and so a verdict."""

from __future__ import annotations

from enum import StrEnum


class Verdict(StrEnum):
    """The answer to "is the candidate slower than the base by more than the margin?"."""

    REGRESSED = "regressed"
    IMPROVED = "improved"
    EQUIVALENT = "equivalent"
    INCONCLUSIVE = "inconclusive"


def verdict(lo: float | None, hi: float | None, margin: float) -> Verdict:
    """Judge the interval of a ratio candidate / base of times, with ``margin`` as a fraction (0.02 = 2 %).

    Ratios within [1 / (1 + margin), 1 + margin] count as equal. Without an interval nothing is concluded.
    """
    if margin < 0:
        raise ValueError(f"a margin is not negative: {margin}.")
    if lo is None or hi is None:
        return Verdict.INCONCLUSIVE
    if not 0 < lo <= hi:
        raise ValueError(f"an interval of a ratio has 0 < lo <= hi, not [{lo}, {hi}].")
    least, most = 1 / (1 + margin), 1 + margin
    if lo > most:
        return Verdict.REGRESSED
    if hi < least:
        return Verdict.IMPROVED
    return Verdict.EQUIVALENT if least <= lo and hi <= most else Verdict.INCONCLUSIVE
