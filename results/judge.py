"""Paired turns in, verdicts on times out: the rule of the gate, which knows nothing of processes and workers.

A case's evidence is one set of turn minima per process pair: of the base, of the base once more (A/A), and of the
candidate, taken in the same turns. The estimate is the median of the log-ratios candidate / base; its variance adds
that within pairs and tau^2 / pairs, where tau is how much process pairs of equal code differ, from the A/A ratios of
all cases. Reasons and measured error rates: docs/gate.md.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .gate import Judged, Noise
from .statistics import (
    benjamini_hochberg,
    between_process_tau,
    detectable_effect,
    look_bound,
    paired_effect,
)
from .verdict import Verdict

TAU_FLOOR = 0.015
"""Process pairs of equal code differ by this much at least: less was measured too rarely to be trusted."""

ENOUGH_AA = 6
"""So many A/A pairs are needed before a machine may be called too noisy."""

Minima = Mapping[str, Sequence[int]]
"""Turn minima in ns by side (``base``, ``again``, ``candidate``), aligned by turn."""


@dataclass(frozen=True)
class Rule:
    """What counts. ``margin``: a slow-down is a regression where its interval lies above 1 + margin. ``asked``: it is
    excluded where the interval lies below 1 + asked. ``looks``: how often at most an undecided case is judged. ``q``:
    the false discovery rate over the cases of a gate.
    """

    margin: float = 0.01
    asked: float = 0.05
    looks: int = 1
    q: float = 0.05
    level: float = 0.95

    @property
    def z(self) -> float:
        """Half the width of an interval in standard errors; wider where there are several looks."""
        return look_bound(self.looks, self.level)


@dataclass
class CaseTurns:
    """The evidence on one case: for each process pair, turn minima by clock; the first clock of a pair is judged."""

    label: str
    case_key: str
    base_case: str
    pairs: list[Mapping[str, Minima]] = field(default_factory=list)

    @property
    def clocks(self) -> list[str]:
        """Names of the clocks that every pair has."""
        return [clock for clock in self.pairs[0] if all(clock in pair for pair in self.pairs)] if self.pairs else []

    def log_ratios(self, clock: str, side: str = "candidate") -> list[np.ndarray]:
        """Return log(side / base) of every turn, one array for each process pair that has both."""
        return [
            np.log(np.asarray(pair[clock][side], float) / np.asarray(pair[clock]["base"], float))
            for pair in self.pairs
            if len(pair[clock].get(side, ())) > 0
        ]

    def median(self, clock: str, side: str) -> float | None:
        """Return the median turn minimum of a side in ns."""
        values = [ns for pair in self.pairs for ns in pair[clock].get(side, ())]
        return float(statistics.median(values)) if values else None


def noise_of(cases: Sequence[CaseTurns], rule: Rule, pairs: int) -> dict[str, Noise]:
    """Return what the A/A ratios of all cases say, by clock; ``pairs`` is how many a case can have at most.

    The detectable slow-down is that of the median case once it has ``pairs`` process pairs.
    """
    found: dict[str, Noise] = {}
    for clock in {clock for case in cases for clock in case.clocks}:
        having = [case for case in cases if clock in case.clocks]
        again = [ratios for case in having for ratios in case.log_ratios(clock, "again")]
        tau = between_process_tau(again, TAU_FLOOR)
        effects = [paired_effect(ratios, tau.value) for ratios in _ratios(having, clock)]
        enough = len(again) >= ENOUGH_AA and effects
        se = statistics.median(one.se * math.sqrt(one.pairs / pairs) for one in effects) if enough else None
        detectable = None if se is None else detectable_effect(se, rule.z, rule.margin)
        found[clock] = Noise(tau.value, tau.measured, detectable, rule.asked, len(again))
    return found


def _ratios(cases: Sequence[CaseTurns], clock: str) -> list[list[np.ndarray]]:
    return [ratios for case in cases if (ratios := case.log_ratios(clock))]


def judge_times(cases: Sequence[CaseTurns], rule: Rule, noise: Mapping[str, Noise]) -> list[Judged]:
    """Return the verdict on the time of every case that has turns, after Benjamini-Hochberg over them."""
    cases = [case for case in cases if case.clocks]
    first = [_judged(case, case.clocks[0], rule, noise) for case in cases]
    others = [[_judged(case, clock, rule, noise) for clock in case.clocks[1:]] for case in cases]
    q_values = benjamini_hochberg([one.p if one.p is not None else 1.0 for one in first])
    return [_settled(replace(one, q=q), rest, rule) for one, q, rest in zip(first, q_values, others, strict=True)]


def _judged(case: CaseTurns, clock: str, rule: Rule, noise: Mapping[str, Noise]) -> Judged:
    ratios = case.log_ratios(clock)
    effect = paired_effect(ratios, noise[clock].tau)
    lo, hi = effect.interval(rule.z)
    return Judged(
        label=case.label,
        case_key=case.case_key,
        base_case=case.base_case,
        kind="time",
        metric="time",
        verdict=time_verdict(lo, hi, rule),
        clock=clock,
        base_value=case.median(clock, "base"),
        candidate_value=case.median(clock, "candidate"),
        unit="ns",
        ratio=math.exp(effect.log_ratio),
        lo=lo,
        hi=hi,
        p=effect.p_above(math.log1p(rule.margin)),
        pairs=effect.pairs,
        turns=effect.turns,
        margin=rule.margin,
        asked=rule.asked,
    )


def time_verdict(lo: float, hi: float, rule: Rule) -> Verdict:
    """Return what an interval of candidate / base says: the question is whether the candidate is slower.

    ``equivalent`` therefore means "not slower by what was asked"; an interval that ends below 1 - margin is improved.
    """
    if lo > 1 + rule.margin:
        return Verdict.REGRESSED
    if hi < 1 / (1 + rule.margin):
        return Verdict.IMPROVED
    return Verdict.EQUIVALENT if hi < 1 + rule.asked else Verdict.INCONCLUSIVE


def _settled(first: Judged, others: Sequence[Judged], rule: Rule) -> Judged:
    """Return the verdict of the first clock, withdrawn where chance over many cases or another clock speaks against."""
    if first.verdict == Verdict.REGRESSED and first.q is not None and first.q > rule.q:
        reason = f"slower on its own, but not among {rule.q:.0%} false discoveries over all cases (q = {first.q:.3f})"
        return replace(first, verdict=Verdict.INCONCLUSIVE, reason=reason)
    opposite = {Verdict.REGRESSED: Verdict.IMPROVED, Verdict.IMPROVED: Verdict.REGRESSED}.get(first.verdict)
    for other in others:
        waits = first.verdict == Verdict.EQUIVALENT and other.verdict == Verdict.REGRESSED
        if other.verdict == opposite or waits:
            reason = f"the {first.clock} clock says {first.verdict}, the {other.clock} clock {other.verdict}"
            return replace(first, verdict=Verdict.INCONCLUSIVE, reason=reason)
    if first.verdict == Verdict.INCONCLUSIVE:
        return replace(first, reason=f"neither shown nor excluded: a slow-down of {rule.asked:.0%}")
    return first


def withdrawn(one: Judged, noise: Noise) -> Judged:
    """Return a time as a machine that is too noisy may give it: without a verdict."""
    detectable = "an unknown slow-down" if noise.detectable is None else f"{noise.detectable:.1%}"
    reason = f"too noisy: can detect only {detectable}, asked for {noise.asked:.0%}"
    return replace(one, verdict=Verdict.INCONCLUSIVE, reason=reason)
