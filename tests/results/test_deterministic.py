"""Verdicts without chance: metrics judged exactly, and accuracy on the same items."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebench.results import accuracy_gate
from moebench.results.accuracy_gate import MARGINS, Margin, item_verdict, judge_items
from moebench.results.deterministic import TOLERANCES, Tolerance, judge_metrics
from moebench.results.statistics import Interval
from moebench.results.verdict import Verdict

NAMES = {"label": "l", "case_key": "c", "base_case": "b"}


def metrics(base, candidate, **tolerances):
    found = judge_metrics(base, candidate, **({"tolerances": tolerances} if tolerances else {}), **NAMES)
    return {one.metric: one for one in found}


def test_an_exact_metric_may_not_move():
    verdicts = [metrics({"flops": 100.0}, {"flops": value})["flops"].verdict for value in (100.0, 101.0, 99.0)]
    assert verdicts == [Verdict.EQUIVALENT, Verdict.REGRESSED, Verdict.IMPROVED]


def test_a_direction_turns_the_verdict():
    assert metrics({"hits": 5.0}, {"hits": 4.0})["hits"].verdict == Verdict.REGRESSED
    assert metrics({"hits": 5.0}, {"hits": 6.0})["hits"].verdict == Verdict.IMPROVED


@pytest.mark.parametrize(
    ("tolerance", "candidate", "expected"),
    [
        (Tolerance(absolute=2.0), 102.0, Verdict.EQUIVALENT),
        (Tolerance(absolute=2.0), 102.5, Verdict.REGRESSED),
        (Tolerance(relative=0.1), 110.0, Verdict.EQUIVALENT),
        (Tolerance(relative=0.1), 89.0, Verdict.IMPROVED),
        (Tolerance(relative=0.01, absolute=5.0), 104.0, Verdict.EQUIVALENT),
    ],
)
def test_tolerances(tolerance, candidate, expected):
    assert metrics({"x": 100.0}, {"x": candidate}, x=tolerance)["x"].verdict == expected


def test_what_depends_on_time_or_chance_is_not_judged():
    base = {"worker_peak_rss": 1.0, "prepare_seconds": 1.0, "perplexity": 1.0, "anything": 1.0}
    assert metrics(base, dict.fromkeys(base, 2.0)) == {}


@pytest.mark.parametrize("absent", [{}, {"bytes": None}, {"bytes": math.nan}, {"bytes": math.inf}])
def test_a_side_that_does_not_tell_leaves_it_open(absent):
    one = metrics(absent, {"bytes": 1.0})["bytes"]
    assert (one.verdict, one.reason, one.base_value) == (Verdict.INCONCLUSIVE, "the base does not tell it", None)
    one = metrics({"bytes": 1.0}, absent)["bytes"]
    assert (one.verdict, one.reason) == (Verdict.INCONCLUSIVE, "the candidate does not tell it")
    assert metrics(absent, absent) == {}


def test_a_base_of_zero_has_no_ratio():
    one = metrics({"dropped_tokens": 0.0}, {"dropped_tokens": 1.0})["dropped_tokens"]
    assert (one.verdict, one.ratio) == (Verdict.REGRESSED, None)


def test_a_judged_metric_tells_everything():
    one = metrics({"bytes": 100.0}, {"bytes": 150.0})["bytes"]
    assert (one.kind, one.unit, one.ratio, one.margin) == ("metric", "byte", 1.5, 0.0)
    assert one.reason == "rose from 100 to 150"
    assert (one.label, one.case_key, one.base_case) == ("l", "c", "b")


@given(st.floats(-1e12, 1e12), st.floats(-1e12, 1e12), st.sampled_from(sorted(TOLERANCES)))
def test_swapping_sides_swaps_the_verdict_of_exact_metrics(a, b, name):
    tolerance = TOLERANCES[name]
    if tolerance.relative:
        return
    forth, back = (metrics({name: x}, {name: y})[name].verdict for x, y in ((a, b), (b, a)))
    swapped = {Verdict.REGRESSED: Verdict.IMPROVED, Verdict.IMPROVED: Verdict.REGRESSED}
    assert back == swapped.get(forth, forth)


# ---------------------------------------------------------------------------------------------------------------------
# Accuracy


def items(values, metric="acc", task="t"):
    return {(task, str(number), metric): value for number, value in enumerate(values)}


def answers(n, wrong):
    return [0.0 if number < wrong else 1.0 for number in range(n)]


@pytest.mark.parametrize(
    ("lo", "hi", "expected"),
    [
        (-0.005, 0.02, Verdict.EQUIVALENT),
        (0.001, 0.02, Verdict.IMPROVED),
        (-0.05, -0.011, Verdict.REGRESSED),
        (-0.05, -0.009, Verdict.INCONCLUSIVE),
        (-0.05, 0.05, Verdict.INCONCLUSIVE),
        (-0.01, 0.0, Verdict.INCONCLUSIVE),
        (None, None, Verdict.INCONCLUSIVE),
    ],
)
def test_the_rule_of_non_inferiority(lo, hi, expected):
    found, _ = item_verdict(Interval(0.0, lo, hi, 20, 10), Margin(0.01))
    assert found == expected
    mirrored = (None, None) if lo is None else (-hi, -lo)
    assert item_verdict(Interval(0.0, *mirrored, 20, 10), Margin(0.01, "higher"))[0] == expected


def test_a_real_loss_is_a_regression_and_a_small_one_is_not():
    base, rng = answers(4000, 400), np.random.default_rng(0)
    worse = [value * (rng.random() > 0.05) for value in base]
    (one,) = judge_items(items(base), items(worse), **NAMES)
    assert (one.verdict, one.kind, one.metric, one.pairs) == (Verdict.REGRESSED, "accuracy", "acc (t)", 4000)
    assert one.lo < one.ratio < one.hi < -0.01
    assert one.ratio == pytest.approx(one.candidate_value - one.base_value)
    (one,) = judge_items(items(base), items(answers(4000, 401)), **NAMES)
    assert one.verdict == Verdict.EQUIVALENT
    (one,) = judge_items(items(worse), items(base), **NAMES)
    assert one.verdict == Verdict.IMPROVED


def test_the_direction_belongs_to_the_metric():
    rng = np.random.default_rng(1)
    base = 2 + rng.random(200)
    higher = base + 0.05 + 0.01 * rng.random(200)
    (loss,) = judge_items(items(base, "nll"), items(higher, "nll"), **NAMES)
    (gain,) = judge_items(items(base, "acc"), items(higher, "acc"), **NAMES)
    assert (loss.verdict, gain.verdict) == (Verdict.REGRESSED, Verdict.IMPROVED)
    assert loss.ratio > 0


def test_pairing_is_by_item_not_by_order():
    values = items(np.random.default_rng(2).integers(0, 2, 50).astype(float))
    (one,) = judge_items(values, dict(reversed(values.items())), **NAMES)
    assert (one.verdict, one.reason) == (Verdict.EQUIVALENT, "all 50 items are the same")


def test_items_that_one_side_lacks_leave_it_open():
    base, candidate = items(answers(100, 10)), items(answers(100, 10))
    del candidate["t", "7", "acc"]
    candidate["t", "8", "acc"] = None
    (one,) = judge_items(base, candidate, **NAMES)
    assert (one.verdict, one.reason) == (Verdict.INCONCLUSIVE, "2 of 100 items have no value on one side")
    (one,) = judge_items(base, {}, **NAMES)
    assert (one.verdict, one.base_value, one.ratio) == (Verdict.INCONCLUSIVE, None, None)


def test_too_few_items_are_told():
    (one,) = judge_items(items([1.0, 0.0]), items([0.0, 1.0]), **NAMES)
    assert one.reason == "2 items bear no interval; 10 are needed"
    (one,) = judge_items(items([1.0, 0.0]), items([1.0, 0.0]), **NAMES)
    assert (one.verdict, one.reason) == (Verdict.INCONCLUSIVE, "2 items bear no interval; 10 are needed")


def test_a_figure_of_a_whole_set_has_no_items_to_judge():
    nothing = items([None] * 20, "mcc")
    (one,) = judge_items(nothing, nothing, **NAMES)
    assert one.verdict == Verdict.INCONCLUSIVE
    assert one.reason == "no item has a value of its own on both sides; compare the tasks' figures"


def test_only_known_metrics_of_items_are_judged():
    base = {**items(answers(20, 2), "acc,none"), **items([1.0] * 20, "length"), **items([1.0] * 20, "f1", "u")}
    found = judge_items(base, base, **NAMES)
    assert [one.metric for one in found] == ["acc,none (t)", "f1 (u)"]
    assert {"nll", "acc", "top1_agreement"} <= set(MARGINS)


def test_right_and_wrong_answers_carry_mcnemars_exact_p():
    base = answers(40, 4)
    candidate = [1.0 - value if number in (0, 10, 11, 12, 13, 14, 15) else value for number, value in enumerate(base)]
    (one,) = judge_items(items(base), items(candidate), **NAMES)
    assert one.p == pytest.approx(2 * (1 + 7) / 2**7)  # 6 lost and 1 won of the 7 that changed
    assert "6 items lost and 1 won, McNemar's exact p = 0.12" in one.reason
    (one,) = judge_items(items([0.5] * 40, "nll"), items([0.6] * 40, "nll"), **NAMES)
    assert one.p is None


def test_items_of_a_text_stay_in_its_order():
    """Their names are numbers as texts; neighbours are resampled together, so the order matters to the interval."""
    rng = np.random.default_rng(3)
    drift = np.repeat(rng.normal(0, 1, 20), 10)
    base, candidate = np.zeros(200), drift + rng.normal(0, 0.1, 200)
    (text,) = judge_items(items(base, "nll"), items(candidate, "nll"), **NAMES)
    order = rng.permutation(200)
    (mixed,) = judge_items(items(base, "nll"), items(candidate[order], "nll"), **NAMES)
    assert text.ratio == pytest.approx(mixed.ratio)
    assert text.hi - text.lo > 1.5 * (mixed.hi - mixed.lo)


def test_margins_of_items_may_be_given():
    base, candidate = items(answers(400, 40)), items(answers(400, 48))
    wide = accuracy_gate.with_margins({"acc": 0.1})
    (one,) = judge_items(base, candidate, wide, **NAMES)
    assert (one.verdict, one.margin) == (Verdict.EQUIVALENT, 0.1)
    for wrong in ({"acc": -1.0}, {"words": 0.1}):
        with pytest.raises(ValueError, match=r"margin of acc|are not judged"):
            accuracy_gate.with_margins(wrong)
