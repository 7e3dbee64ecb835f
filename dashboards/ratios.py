"""Ratios of times, from turns that were taken together: nothing is paired across sittings."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..results.statistics import paired_log_ratio
from .data import Case
from .query import Answer
from .units import digits

Turns = Mapping[str, Mapping[int, int]]
"""Turn minima in ns by sitting and turn."""


@dataclass(frozen=True)
class Ratio:
    """Time of a case divided by that of a baseline, with an interval and the number of pairs of turns."""

    ratio: float
    lo: float | None
    hi: float | None
    pairs: int

    def __str__(self) -> str:
        bounds = "" if self.lo is None or self.hi is None else f" [{digits(self.lo, 3)}, {digits(self.hi, 3)}]"
        return f"{digits(self.ratio, 3)} × baseline{bounds}"  # noqa: RUF001


def turn_minima(answer: Answer) -> dict[str, dict[str, dict[int, int]]]:
    """Return turn minima by case, sitting and turn."""
    result: dict[str, dict[str, dict[int, int]]] = defaultdict(dict)
    for row in answer.rows:
        sitting = f"{row['clock']}/{row['sitting']}/{row['process']}"
        result[row["case_key"]][sitting] = dict(zip(row["turns"], row["minima_ns"], strict=True))
    return dict(result)


def paired_ratio(base: Turns, case: Turns) -> Ratio | None:
    """Return time of ``case`` over time of ``base``; None where they never took turns together.

    Each sitting gives a ratio with its interval; the result is the median of the ratios and the envelope of the
    intervals, so that a difference between processes widens it.
    """
    found = []
    for sitting, turns in case.items():
        common = sorted(turns.keys() & base.get(sitting, {}).keys())
        if common:
            found.append(paired_log_ratio([turns[t] for t in common], [base[sitting][t] for t in common]))
    if not found:
        return None
    bounds = [(one.lo, one.hi) for one in found if one.lo is not None and one.hi is not None]
    known = len(bounds) == len(found)
    return Ratio(
        statistics.median(one.ratio for one in found),
        min(lo for lo, _ in bounds) if known else None,
        max(hi for _, hi in bounds) if known else None,
        sum(one.n for one in found),
    )


def baseline_of(cases: Sequence[Case]) -> Case:
    """Return the case that the others of a group are divided by: eager where it ran, and the plainest method.

    Among equally plain methods it is one with the routing that most cases of the group have.
    """
    routings = Counter(case.axes["routing"] for case in cases)

    def rank(case: Case) -> tuple[bool, bool, int, int]:
        plain = sum(case.axes[axis] == "none" for axis in ("structure", "quantization", "sparsity"))
        return bool(case.flags), case.axes["backend"] != "eager", -plain, -routings[case.axes["routing"]]

    return min(cases, key=rank)
