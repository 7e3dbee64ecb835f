"""The gate's rule on simulated turns: how often it is wrong, and what it never does."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.results.gate import Noise
from moebench.results.judge import CaseTurns, Rule, judge_times, noise_of, time_verdict, withdrawn
from moebench.results.verdict import Verdict

TAU = 0.01


def case_of(rng, effect, number=0, pairs=5, turns=30, tau=TAU, spread=0.02, clocks=("cpu",), others=0.0):
    """Evidence on one case whose process pairs differ by ``tau`` and whose turns by ``spread``."""
    case = CaseTurns(f"case {number}", str(number), str(number))
    for _ in range(pairs):
        bias = tau * rng.standard_normal(2)
        sides = {
            "base": np.exp(spread * rng.standard_normal(turns)),
            "again": np.exp(bias[0] + spread * rng.standard_normal(turns)),
            "candidate": (1 + effect) * np.exp(bias[1] + spread * rng.standard_normal(turns)),
        }
        minima = {side: (1e6 * values).astype(int).tolist() for side, values in sides.items()}
        slower = {**minima, "candidate": [int(ns * (1 + others)) for ns in minima["candidate"]]}
        case.pairs.append({clock: minima if place == 0 else slower for place, clock in enumerate(clocks)})
    return case


def judged(cases, rule=None, pairs=5):
    rule = rule or Rule()
    return judge_times(cases, rule, noise_of(cases, rule, pairs))


def rate(effect, experiments=60, cases=8, **options):
    """Share of "regressed" over calls of 8 cases of equal effect."""
    rng = np.random.default_rng(int(1000 * effect) + cases)
    said = [
        one.verdict
        for _ in range(experiments)
        for one in judged([case_of(rng, effect, number, **options) for number in range(cases)])
    ]
    return said.count(Verdict.REGRESSED) / len(said)


def test_equal_code_is_hardly_ever_called_slower():
    assert rate(0.0) <= 0.01  # 480 verdicts; the rule's own size at tau = 1 % is below 0.1 %


def test_five_per_cent_are_found():
    assert rate(0.05) >= 0.95


def test_more_spread_between_processes_than_the_floor_costs_power_and_no_false_alarms():
    assert rate(0.0, tau=0.04) <= 0.02
    assert rate(0.05, tau=0.04) < 0.6
    assert rate(0.25, tau=0.04) >= 0.9


def test_few_slow_cases_among_many_are_found_and_little_else():
    """60 cases, 4 of them 5 % slower, 15 process pairs in 3 looks' width."""
    rng, rule = np.random.default_rng(7), Rule(looks=3)
    shares, found = [], []
    for _ in range(15):
        cases = [case_of(rng, 0.05 if number < 4 else 0.0, number, pairs=15) for number in range(60)]
        hits = [one.verdict == Verdict.REGRESSED for one in judged(cases, rule, 15)]
        shares.append(sum(hits[4:]) / max(1, sum(hits)))
        found.append(sum(hits[:4]) / 4)
    assert np.mean(shares) <= 0.05
    assert np.mean(found) >= 0.85


@given(st.floats(0.5, 2.0), st.floats(0.0, 0.3))
def test_verdicts_do_not_contradict_their_interval(lo, width):
    rule = Rule()
    verdict = time_verdict(lo, lo + width, rule)
    assert (verdict == Verdict.REGRESSED) == (lo > 1.01)
    if verdict == Verdict.EQUIVALENT:
        assert lo + width < 1.05
    if verdict == Verdict.IMPROVED:
        assert lo + width < 1


@given(st.floats(0.8, 1.3))
@settings(max_examples=20, deadline=None)
def test_the_estimate_is_the_ratio_where_there_is_no_noise(factor):
    case = case_of(np.random.default_rng(0), factor - 1, tau=0.0, spread=0.0)
    one = judged([case])[0]
    assert one.ratio == pytest.approx(factor, rel=1e-5)
    assert one.lo < one.ratio < one.hi, "process pairs are never thought to be all alike"


def test_clocks_that_contradict_each_other_conclude_nothing():
    rng = np.random.default_rng(1)
    waits = judged([case_of(rng, 0.0, clocks=("cpu", "wall"), others=0.5)])[0]
    assert waits.verdict == Verdict.INCONCLUSIVE
    assert "the wall clock regressed" in waits.reason
    both = judged([case_of(rng, 0.2, clocks=("cpu", "wall"))])[0]
    assert both.verdict == Verdict.REGRESSED


def test_a_machine_that_cannot_tell_is_told_so():
    rng = np.random.default_rng(2)
    cases = [case_of(rng, 0.0, number, tau=0.08) for number in range(4)]
    noise = noise_of(cases, Rule(), 5)["cpu"]
    assert noise.too_noisy
    assert noise.detectable > 0.05
    one = withdrawn(judged(cases)[0], noise)
    assert one.verdict == Verdict.INCONCLUSIVE
    assert one.reason == f"too noisy: can detect only {noise.detectable:.1%}, asked for 5%"


def test_few_pairs_do_not_make_a_machine_too_noisy():
    noise = noise_of([case_of(np.random.default_rng(3), 0.0, pairs=2, tau=0.2)], Rule(), 5)["cpu"]
    assert noise == Noise(0.015, None, None, 0.05, 2)


def test_one_pair_that_is_far_off_does_not_make_a_regression():
    """Seen on an idle machine: one process pair in eight was 15 % off."""
    rng = np.random.default_rng(4)
    case = case_of(rng, 0.0)
    case.pairs[2] = {
        "cpu": {**case.pairs[2]["cpu"], "candidate": [int(1.15 * ns) for ns in case.pairs[2]["cpu"]["base"]]}
    }
    assert judged([case])[0].verdict != Verdict.REGRESSED
