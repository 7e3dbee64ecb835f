"""What measurements say about a published claim: pairs (a, b) over seeds in, a verdict with an interval out.

A rule compares ``a`` with ``b`` as a ``ratio`` a / b (centre 1) or a ``difference`` a - b (centre 0). Its region is
centre ± margin for ``equal``, up to centre + margin for ``at_most``, and from centre + margin for ``at_least``.

Identities and theorems leave no room for chance: every pair must lie in the region. An empirical claim is judged by the
interval of the mean over seeds: supported inside the region, not supported outside, and otherwise inconclusive. Where
``a`` must be better than ``b``, however little, and is equal to it in every seed, nothing was told apart: inconclusive.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .statistics import student_quantile

LEAST_SEEDS = 3
LEVEL = 0.95

DIRECTIONS = ("equal", "at_most", "at_least")
UNITS = ("ratio", "difference")
KINDS = ("identity", "theorem", "empirical")

Pair = tuple[int, float, float]
"""(seed, a, b)."""


@dataclass(frozen=True)
class Rule:
    """What must hold between a and b; see the module."""

    direction: str
    margin: float
    unit: str

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS or self.unit not in UNITS or not math.isfinite(self.margin):
            raise ValueError(f"a rule has a direction of {DIRECTIONS}, a unit of {UNITS} and a finite margin: {self}.")
        if self.direction == "equal" and self.margin < 0:
            raise ValueError(f"the margin of an equality is not negative: {self.margin}.")

    @property
    def centre(self) -> float:
        """What a = b gives."""
        return 1.0 if self.unit == "ratio" else 0.0

    @property
    def region(self) -> tuple[float, float]:
        """The least and the largest value that agree with the rule."""
        edge = self.centre + self.margin
        if self.direction == "at_most":
            return -math.inf, edge
        return (edge, math.inf) if self.direction == "at_least" else (self.centre - self.margin, edge)

    def tied(self, values: Sequence[float]) -> bool:
        """Whether the rule sets ``a`` against ``b`` without a margin, and no value tells them apart."""
        return self.direction != "equal" and self.margin == 0 and all(value == self.centre for value in values)

    def value(self, a: float, b: float) -> float:
        """Return a - b or a / b; ValueError where the ratio has no meaning."""
        if self.unit == "difference":
            return a - b
        if a <= 0 or b <= 0:
            raise ValueError(f"a ratio needs positive numbers, not {a:g} and {b:g}")
        return a / b


@dataclass(frozen=True)
class Judgement:
    """The verdict on a claim, with the estimate of a - b or a / b and its interval."""

    verdict: str
    estimate: float | None = None
    lo: float | None = None
    hi: float | None = None
    reason: str = ""


def judge(kind: str, rule: Rule, seeds: Sequence[int], pairs: Sequence[Pair]) -> Judgement:
    """Judge a claim of ``kind`` by ``pairs``; ``seeds`` are those that were asked for."""
    if kind not in KINDS:
        raise ValueError(f"a claim is one of {KINDS}, not '{kind}'.")
    missing = sorted(set(seeds) - {seed for seed, _, _ in pairs})
    lacking = f"no result for seed {', '.join(map(str, missing))}" if missing else ""
    try:
        values = [rule.value(a, b) for _, a, b in pairs]
    except ValueError as error:
        return Judgement("fails" if kind != "empirical" else "inconclusive", reason=str(error))
    if not values:
        return Judgement("inconclusive", reason=lacking or "no seeds were asked for")
    if kind != "empirical":
        return _exact(rule, values, lacking)
    if len({seed for seed, _, _ in pairs}) < len(pairs):
        return Judgement("inconclusive", reason="a seed has several results; the metric must give one")
    return _empirical(rule, values, lacking)


def _exact(rule: Rule, values: Sequence[float], lacking: str) -> Judgement:
    """Judge by every value: the estimate is the one farthest from the centre, the interval their range."""
    worst = max(values, key=lambda value: abs(value - rule.centre))
    least, most = rule.region
    wrong = sum(not least <= value <= most for value in values)
    if wrong:
        reason = f"{wrong} of {len(values)} values lie outside the margin"
        return Judgement("fails", worst, min(values), max(values), reason)
    verdict = "inconclusive" if lacking else "holds"
    return Judgement(verdict, worst, min(values), max(values), lacking)


def _empirical(rule: Rule, values: Sequence[float], lacking: str) -> Judgement:
    if len(values) < LEAST_SEEDS:
        reason = f"{len(values)} of {LEAST_SEEDS} seeds that an interval needs" + (f"; {lacking}" if lacking else "")
        return Judgement("inconclusive", _centre_of(rule, values), reason=reason)
    estimate, lo, hi = mean_interval(values, geometric=rule.unit == "ratio")
    if rule.tied(values):
        return Judgement("inconclusive", estimate, lo, hi, "a equals b in every seed, so nothing was told apart")
    least, most = rule.region
    if least <= lo and hi <= most:
        return Judgement("supported", estimate, lo, hi, lacking)
    if hi < least or lo > most:
        return Judgement("not supported", estimate, lo, hi, lacking)
    return Judgement("inconclusive", estimate, lo, hi, lacking or "the interval crosses the margin")


def _centre_of(rule: Rule, values: Sequence[float]) -> float:
    return statistics.geometric_mean(values) if rule.unit == "ratio" else statistics.fmean(values)


def mean_interval(values: Sequence[float], geometric: bool = False, level: float = LEVEL) -> tuple[float, float, float]:
    """Return (mean, lo, hi) by Student's t; with ``geometric`` of the logarithms, brought back by exp."""
    x = [math.log(value) for value in values] if geometric else list(values)
    mean = statistics.fmean(x)
    half = student_quantile(len(x) - 1, level) * statistics.stdev(x) / math.sqrt(len(x))
    low, middle, high = mean - half, mean, mean + half
    return (math.exp(middle), math.exp(low), math.exp(high)) if geometric else (middle, low, high)
