"""Error rates of the gate by simulation from recorded turns, for what cannot be recorded often enough.

A simulated case takes whole recorded process pairs of idle or busy calls without injected work, of calls that were held
out, each with a random sign (base and candidate trade places), and gets its true effect added to the log-ratios.
Inside a pair, turns stay as they were. The A/A ratios that tau is estimated from are those of the same pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moebench.results.judge import CaseTurns, Rule, judge_times, noise_of
from moebench.results.verdict import Verdict

CLOCK = "cpu"


@dataclass(frozen=True)
class Recorded:
    """Log-ratios of one recorded process pair of one case: candidate / base and again / base, by turn."""

    candidate: np.ndarray
    again: np.ndarray


def simulated_case(
    recorded: Sequence[Recorded], pairs: int, effect: float, number: int, rng: np.random.Generator
) -> CaseTurns:
    """Return the evidence on one case of ``pairs`` process pairs whose true slow-down is ``effect`` (a fraction)."""
    case = CaseTurns(f"case {number}", str(number), str(number))
    for index in rng.integers(0, len(recorded), pairs):
        one = recorded[index]
        sign = rng.choice((-1.0, 1.0))
        ones = np.full(len(one.candidate), 1e6)
        sides = {
            "base": ones,
            "again": 1e6 * np.exp(sign * one.again),
            "candidate": 1e6 * np.exp(sign * one.candidate) * (1 + effect),
        }
        case.pairs.append({CLOCK: {side: values.tolist() for side, values in sides.items()}})
    return case


def rates(
    recorded: Sequence[Recorded], pairs: int, looks: int, effect: float, trials: int, cases: int = 8, seed: int = 0
) -> list[list[Verdict]]:
    """Return the verdicts of ``trials`` simulated calls of ``cases`` cases that all have the same effect."""
    rng = np.random.default_rng(seed)
    return [_call(recorded, pairs, looks, [effect] * cases, rng) for _ in range(trials)]


def discoveries(
    recorded: Sequence[Recorded], pairs: int, looks: int, trials: int, seed: int = 0, true: int = 4, cases: int = 60
) -> tuple[float, float]:
    """Return (false discovery rate, power) over calls of 60 cases of which 4 are 5 % slower."""
    rng = np.random.default_rng(seed)
    false_share, found = [], []
    for _ in range(trials):
        verdicts = _call(recorded, pairs, looks, [0.05] * true + [0.0] * (cases - true), rng)
        hits = [verdict == Verdict.REGRESSED for verdict in verdicts]
        false_share.append(sum(hits[true:]) / max(1, sum(hits)))
        found.append(sum(hits[:true]) / true)
    return float(np.mean(false_share)), float(np.mean(found))


def _call(
    recorded: Sequence[Recorded], pairs: int, looks: int, effects: Sequence[float], rng: np.random.Generator
) -> list[Verdict]:
    """Judge one call as the gate does: after each fifth pair, the undecided ones again."""
    rule = Rule(looks=looks)
    cases = [simulated_case(recorded, pairs, effect, number, rng) for number, effect in enumerate(effects)]
    verdicts: dict[str, Verdict] = {}
    for look in range(looks):
        have = (look + 1) * pairs // looks
        seen = [CaseTurns(one.label, one.case_key, one.base_case, one.pairs[:have]) for one in cases]
        noise = noise_of(seen, rule, pairs)
        open_ones = [one for one in seen if verdicts.get(one.case_key, Verdict.INCONCLUSIVE) == Verdict.INCONCLUSIVE]
        verdicts |= {one.case_key: one.verdict for one in judge_times(open_ones, rule, noise)}
    return [verdicts[one.case_key] for one in cases]
