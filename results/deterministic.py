"""Metrics that two runs of the same code give alike to the last digit, judged exactly or within a tolerance.

No chance is in them, so they need no interval and raise no false alarm; they carry most of a gate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeGuard

from .gate import Judged
from .verdict import Verdict


@dataclass(frozen=True)
class Tolerance:
    """What a metric may differ by, absolutely or relative to the base; ``worse`` is the direction that regresses."""

    worse: str = "higher"
    absolute: float = 0.0
    relative: float = 0.0
    unit: str = ""

    def allowed(self, base: float) -> float:
        """Return the largest difference that counts as none."""
        return max(self.absolute, self.relative * abs(base))


EXACT = Tolerance(unit="1")

TOLERANCES: dict[str, Tolerance] = {
    "flops": Tolerance(unit="flop"),
    "bytes": Tolerance(unit="byte"),
    "footprint": Tolerance(unit="byte"),
    "resident_bytes": Tolerance(unit="byte"),
    "expert_bytes": Tolerance(unit="byte"),
    "packed_bytes": Tolerance(unit="byte"),
    "file_bytes": Tolerance(unit="byte"),
    "bits_per_weight": Tolerance(unit="bit"),
    "peak_allocated_bytes": Tolerance(unit="byte"),
    "saved_tensor_bytes": Tolerance(unit="byte"),
    "peak_step_bytes": Tolerance(unit="byte"),
    "weight_copies": EXACT,
    "distinct_experts": EXACT,
    "assignments": EXACT,
    "dropped_tokens": EXACT,
    "drop_rate": EXACT,
    "misses": EXACT,
    "hits": Tolerance(worse="lower", unit="1"),
    "hit_rate": Tolerance(worse="lower", unit="1"),
    "registers": EXACT,
    "stack": Tolerance(unit="byte"),
    "spills": EXACT,
    "shared_memory": Tolerance(unit="byte"),
    "occupancy": Tolerance(worse="lower", unit="1"),
    "error": Tolerance(relative=0.25, absolute=1e-7, unit="1"),
}
"""Metrics that are gated; others depend on time, chance or the machine. The numerical error is a largest one over calls
whose number depends on time, so it may move a little."""


def with_margins(margins: Mapping[str, float]) -> dict[str, Tolerance]:
    """Return the tolerances with those of ``margins`` (name -> fraction of the base) in place of our own.

    ValueError with a sentence for a metric that is not gated, or a margin that is negative.
    """
    for name, margin in margins.items():
        if name not in TOLERANCES:
            raise ValueError(f"metric '{name}' is not gated: known are {', '.join(sorted(TOLERANCES))}.")
        if not 0 <= margin < math.inf:
            raise ValueError(f"the margin of {name} must be a fraction from 0, such as 0.02.")
    own = {name: replace(TOLERANCES[name], absolute=0.0, relative=margin) for name, margin in margins.items()}
    return {**TOLERANCES, **own}


def judge_metrics(
    base: Mapping[str, float | None],
    candidate: Mapping[str, float | None],
    tolerances: Mapping[str, Tolerance] = TOLERANCES,
    *,
    label: str,
    case_key: str,
    base_case: str,
) -> list[Judged]:
    """Return a verdict on each metric with a tolerance that either side tells; one that a side lacks stays open.

    What neither tells (NULL, not finite) is no metric of the case, such as the hits of a backend without a cache.
    """
    return [
        _judged(name, base.get(name), candidate.get(name), tolerance, label, case_key, base_case)
        for name, tolerance in tolerances.items()
        if _told(base.get(name)) or _told(candidate.get(name))
    ]


def _judged(
    name: str,
    base: float | None,
    candidate: float | None,
    tolerance: Tolerance,
    label: str,
    case_key: str,
    base_case: str,
) -> Judged:
    verdict, reason = _verdict(base, candidate, tolerance)
    return Judged(
        label=label,
        case_key=case_key,
        base_case=base_case,
        kind="metric",
        metric=name,
        verdict=verdict,
        reason=reason,
        base_value=base if _told(base) else None,
        candidate_value=candidate if _told(candidate) else None,
        unit=tolerance.unit,
        ratio=candidate / base if _told(base) and base and _told(candidate) else None,
        margin=tolerance.allowed(base) if _told(base) else 0.0,
    )


def _told(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _verdict(base: float | None, candidate: float | None, tolerance: Tolerance) -> tuple[Verdict, str]:
    if not _told(base):
        return Verdict.INCONCLUSIVE, "the base does not tell it"
    if not _told(candidate):
        return Verdict.INCONCLUSIVE, "the candidate does not tell it"
    difference = candidate - base
    if abs(difference) <= tolerance.allowed(base):
        return Verdict.EQUIVALENT, ""
    worse = (difference > 0) == (tolerance.worse == "higher")
    way = f"{'rose' if difference > 0 else 'fell'} from {base:g} to {candidate:g}"
    return (Verdict.REGRESSED if worse else Verdict.IMPROVED), way
