"""Error rates of the gate by simulation from recorded turns, for what cannot be recorded often enough.

A simulated case takes whole recorded process pairs of calls without injected work, each with a random sign (base and
candidate trade places), and gets its true effect added to the log-ratios. Inside a pair, turns stay as they were. The
A/A ratios that tau is estimated from are those of the same pairs. Cases are judged in batches, as the gate does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from records import Recorded

from moebench.bench.gate.cases import MOST_TOGETHER
from moebench.results.judge import CaseTurns, Rule, judge_times, noise_of, withdrawn
from moebench.results.verdict import Verdict

CLOCK = "cpu"
UNIT_NS = 1e6


def simulated_case(
    recorded: Sequence[Recorded], pairs: int, effect: float, number: int, rng: np.random.Generator
) -> CaseTurns:
    """Return the evidence on one case of ``pairs`` process pairs whose true slow-down is ``effect`` (a fraction)."""
    case = CaseTurns(f"case {number}", str(number), str(number))
    for index in rng.integers(0, len(recorded), pairs):
        one = recorded[index]
        sign = rng.choice((-1.0, 1.0))
        sides = {
            "base": np.full(len(one.candidate), UNIT_NS),
            "again": UNIT_NS * np.exp(sign * one.again),
            "candidate": UNIT_NS * np.exp(sign * one.candidate) * (1 + effect),
        }
        case.pairs.append({CLOCK: {side: values.tolist() for side, values in sides.items()}})
    return case


def regressed_share(
    recorded: Sequence[Recorded], pairs: int, looks: int, effect: float, trials: int, cases: int = 8
) -> float:
    """Return the share of ``regressed`` in ``trials`` simulated calls of ``cases`` cases with the same effect."""
    rng = np.random.default_rng(0)
    said = [one for _ in range(trials) for one in call(recorded, pairs, looks, [effect] * cases, rng)]
    return said.count(Verdict.REGRESSED) / len(said)


def discoveries(
    recorded: Sequence[Recorded], pairs: int, looks: int, trials: int, true: int = 4, cases: int = 60
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return (false discovery rate, its standard error) and (power, its standard error): 60 cases, 4 slower by 5 %."""
    rng = np.random.default_rng(0)
    false_share, found = [], []
    for _ in range(trials):
        slower = np.zeros(cases, dtype=bool)
        slower[rng.choice(cases, true, replace=False)] = True
        said = call(recorded, pairs, looks, np.where(slower, 0.05, 0.0).tolist(), rng)
        hits = np.array([verdict == Verdict.REGRESSED for verdict in said])
        false_share.append(float(hits[~slower].sum()) / max(1, hits.sum()))
        found.append(float(hits[slower].mean()))
    return _mean_and_error(false_share), _mean_and_error(found)


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5)


def call(
    recorded: Sequence[Recorded], pairs: int, looks: int, effects: Sequence[float], rng: np.random.Generator
) -> list[Verdict]:
    """Return the verdicts of one simulated call, batch after batch; after each fifth pair the undecided again."""
    cases = [simulated_case(recorded, pairs, effect, number, rng) for number, effect in enumerate(effects)]
    verdicts: dict[str, Verdict] = {}
    done: list[CaseTurns] = []
    for first in range(0, len(cases), MOST_TOGETHER):
        batch = cases[first : first + MOST_TOGETHER]
        done += _batch(batch, done, pairs, looks, verdicts)
    return [verdicts[one.case_key] for one in cases]


def _batch(
    batch: Sequence[CaseTurns], done: Sequence[CaseTurns], pairs: int, looks: int, verdicts: dict[str, Verdict]
) -> list[CaseTurns]:
    """Judge a batch into ``verdicts`` and return the turns that it took; a case that is decided takes no more."""
    rule = Rule(looks=looks)
    seen = {one.case_key: CaseTurns(one.label, one.case_key, one.base_case, []) for one in batch}
    waiting = list(batch)
    for look in range(looks):
        for one in waiting:
            seen[one.case_key].pairs[:] = one.pairs[: (look + 1) * pairs // looks]
        noise = noise_of([*done, *seen.values()], rule, pairs)
        judged = judge_times([seen[one.case_key] for one in waiting], rule, noise)
        if noise[CLOCK].too_noisy:
            verdicts |= {one.case_key: withdrawn(one, noise[CLOCK]).verdict for one in judged}
            break
        verdicts |= {one.case_key: one.verdict for one in judged}
        waiting = [one for one in waiting if verdicts[one.case_key] == Verdict.INCONCLUSIVE]
        if not waiting:
            break
    return list(seen.values())
