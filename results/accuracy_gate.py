"""Is the candidate's accuracy at most a margin worse? Asked of the same items on both sides, one by one.

Right and wrong answers get the interval of Bonett & Price and McNemar's exact p; other values, which neighbouring items
may share in part, a paired block bootstrap over the items in their order.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .gate import Judged
from .statistics import Interval, mcnemar_p, paired_block_difference, paired_difference
from .verdict import Verdict

ItemKey = tuple[str, str, str]
"""(task, item, metric)."""

Values = Mapping[ItemKey, float | None]


@dataclass(frozen=True)
class Margin:
    """By how much the mean of a metric may be worse; ``worse`` is the direction that regresses."""

    margin: float = 0.01
    worse: str = "lower"
    unit: str = "1"


POINT = Margin()

MARGINS: dict[str, Margin] = {
    **dict.fromkeys(("acc", "acc_norm", "acc_bytes", "exact_match", "f1", "mcc"), POINT),
    **dict.fromkeys(("top1_agreement", "reference_agreement"), POINT),
    "nll": Margin(worse="higher", unit="nat/token"),
    "bits_per_byte": Margin(worse="higher", unit="bit/byte"),
    "kl_to_dense": Margin(worse="higher", unit="nat/token"),
}
"""Metrics of items that are judged: one point of a share of right answers, one hundredth of a nat (1 %) or of a bit."""


def judge_items(
    base: Values,
    candidate: Values,
    margins: Mapping[str, Margin] = MARGINS,
    *,
    label: str,
    case_key: str,
    base_case: str,
    level: float = 0.95,
) -> list[Judged]:
    """Return a verdict on each task and metric that has a margin; ``ratio``, ``lo``, ``hi`` are candidate - base.

    Not regressed where the whole interval lies within the margin, regressed where all of it lies beyond, improved
    where it lies on the better side of 0, and inconclusive otherwise. Items that one side lacks leave a favourable
    answer open: they may be the very ones that went wrong.
    """
    groups: dict[tuple[str, str], set[str]] = defaultdict(set)
    for task, item, metric in (*base, *candidate):
        if plain_name(metric) in margins:
            groups[task, metric].add(item)
    named = Judged(label, case_key, base_case, "accuracy", "", Verdict.INCONCLUSIVE)
    found = []
    for (task, metric), items in sorted(groups.items()):
        order = sorted(items, key=lambda item: (len(item), item))  # numbers as texts, in the order of the numbers
        values = [(base.get((task, item, metric)), candidate.get((task, item, metric))) for item in order]
        judged = _judged(values, margins[plain_name(metric)], level)
        found.append(replace(named, metric=f"{metric} ({task})", **judged))
    return found


def _judged(values: Sequence[tuple[float | None, float | None]], margin: Margin, level: float) -> dict[str, Any]:
    """Return the fields of the verdict on the values of base and candidate, one pair for each item."""
    pairs = [(a, b) for a, b in values if a is not None and b is not None and math.isfinite(a) and math.isfinite(b)]
    a_N, b_N = [a for a, _ in pairs], [b for _, b in pairs]
    binary = {*a_N, *b_N} <= {0.0, 1.0}
    interval = (paired_difference if binary else paired_block_difference)(a_N, b_N, level)
    verdict, reason = item_verdict(interval, margin, len(values) - len(pairs), bool(pairs) and a_N == b_N)
    p = mcnemar_p(a_N, b_N) if binary and pairs else None
    if p is not None and interval.lo is not None and a_N != b_N:
        lost, won = (sum(x > y for x, y in zip(one, other, strict=True)) for one, other in ((a_N, b_N), (b_N, a_N)))
        reason = "; ".join(filter(None, (reason, f"{lost} items lost and {won} won, McNemar's exact p = {p:.2g}")))
    return {
        "verdict": verdict,
        "reason": reason,
        "base_value": math.fsum(a_N) / len(a_N) if a_N else None,
        "candidate_value": math.fsum(b_N) / len(b_N) if b_N else None,
        "unit": margin.unit,
        "ratio": interval.value,
        "lo": interval.lo,
        "hi": interval.hi,
        "p": p,
        "pairs": len(pairs),
        "margin": margin.margin,
        "asked": margin.margin,
    }


def item_verdict(interval: Interval, margin: Margin, lacking: int = 0, same: bool = False) -> tuple[Verdict, str]:
    """Return the verdict on the interval of a mean difference candidate - base, and why it is none.

    ``lacking`` items have no value on one side; ``same`` says that all others are equal, which needs no interval.
    """
    verdict, reason = _of_interval(interval, margin)
    if same and interval.n >= interval.n_required:
        verdict, reason = Verdict.EQUIVALENT, f"all {interval.n} items are the same"
    if lacking and not interval.n:
        return Verdict.INCONCLUSIVE, "no item has a value of its own on both sides; compare the tasks' figures"
    if lacking and verdict != Verdict.REGRESSED:
        return Verdict.INCONCLUSIVE, f"{lacking} of {lacking + interval.n} items have no value on one side"
    return verdict, reason


def _of_interval(interval: Interval, margin: Margin) -> tuple[Verdict, str]:
    if interval.lo is None or interval.hi is None:
        return Verdict.INCONCLUSIVE, f"{interval.n} items bear no interval; {interval.n_required} are needed"
    lower = margin.worse == "lower"
    worst, best = (interval.lo, interval.hi) if lower else (-interval.hi, -interval.lo)
    if worst > 0:
        return Verdict.IMPROVED, ""
    if worst > -margin.margin:
        return Verdict.EQUIVALENT, ""
    if best < -margin.margin:
        return Verdict.REGRESSED, ""
    return Verdict.INCONCLUSIVE, f"a loss of {margin.margin:g} is neither shown nor excluded by {interval.n} items"


def with_margins(margins: Mapping[str, float]) -> dict[str, Margin]:
    """Return MARGINS with those of ``margins`` (name -> absolute margin) in place of our own.

    ValueError with a sentence for a metric whose items are not judged, or a margin that is negative.
    """
    for name, margin in margins.items():
        if name not in MARGINS:
            raise ValueError(f"items of '{name}' are not judged: known are {', '.join(sorted(MARGINS))}.")
        if not 0 <= margin < math.inf:
            raise ValueError(f"the margin of {name} must be a number from 0, such as 0.02.")
    return {**MARGINS, **{name: replace(MARGINS[name], margin=margin) for name, margin in margins.items()}}


def plain_name(metric: str) -> str:
    """Return the name of a metric without the filter that lm-eval puts behind a comma."""
    return metric.partition(",")[0]
