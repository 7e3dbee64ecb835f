"""The statistics of gates and histories against scipy, published tables, closed forms and what must not change them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moebench.results.statistics import (
    benjamini_hochberg,
    between_process_tau,
    change_points,
    clopper_pearson,
    clustered_proportion,
    detectable_effect,
    look_bound,
    mcnemar_p,
    median_se,
    paired_difference,
    paired_effect,
    student_quantile,
    student_tail,
)

chances = st.lists(st.floats(0, 1), min_size=1, max_size=40)


@given(chances)
def test_q_values_are_those_of_scipy_and_keep_the_order_of_p(p):
    q = benjamini_hochberg(p)
    assert q == pytest.approx(list(stats.false_discovery_control(p)), abs=1e-12)
    assert all(one >= other * (1 - 1e-15) for one, other in zip(q, p, strict=True))
    in_order = [q[index] for index in np.argsort(p)]
    assert in_order == sorted(in_order)


def test_no_p_values_have_no_q_values_and_what_is_no_chance_is_refused():
    assert benjamini_hochberg([]) == []
    with pytest.raises(ValueError, match="between 0 and 1"):
        benjamini_hochberg([0.5, 1.5])


@pytest.mark.parametrize(
    ("level", "published"),
    [
        (0.95, [1.960, 2.178, 2.289, 2.361, 2.413, 2.453, 2.485, 2.512, 2.535, 2.555]),
        (0.99, [2.576, 2.772, 2.873, 2.939, 2.986]),
        (0.90, [1.645, 1.875, 1.992, 2.067, 2.122]),
    ],
)
def test_bounds_of_several_looks_are_those_of_pococks_table(level, published):
    """Jennison & Turnbull, Group Sequential Methods (2000), table 2.1."""
    assert [look_bound(k, level) for k in range(1, len(published) + 1)] == pytest.approx(published, abs=6e-4)


def test_several_looks_at_sums_of_normals_cross_the_bound_as_often_as_they_may():
    """100 000 experiments: the Monte-Carlo error of 5 % is 0.07 points; the bound of one look would cross in 10.7 %."""
    steps = np.random.default_rng(1).standard_normal((100_000, 3))
    z = np.abs(np.cumsum(steps, axis=1) / np.sqrt([1, 2, 3])).max(axis=1)
    assert np.mean(z > look_bound(3)) == pytest.approx(0.05, abs=0.003)
    assert np.mean(z > look_bound(1)) > 0.1


@pytest.mark.parametrize("freedom", [1, 2, 3, 8, 49, 300])
def test_students_t_is_that_of_scipy(freedom):
    for level in (0.5, 0.95, 0.999):
        assert student_quantile(freedom, level) == pytest.approx(stats.t.ppf((1 + level) / 2, freedom), rel=1e-9)
    for t in (0.0, 0.3, -2.0, 6.0):
        assert student_tail(t, freedom) == pytest.approx(2 * stats.t.sf(abs(t), freedom), abs=1e-13)


@pytest.mark.parametrize("n", [1, 7, 60, 3000])
def test_exact_shares_are_those_of_scipy(n):
    for successes in {0, 1, n // 3, n - 1, n}:
        found, theirs = clopper_pearson(successes, n), stats.binomtest(successes, n).proportion_ci(0.95, "exact")
        assert (found.lo, found.hi) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_successes_that_come_as_calls_do_are_worth_the_calls():
    """Ten verdicts of a call that always agree: 100 verdicts bear what 10 would, but for the variance's 10 / 9."""
    found, of_calls = clustered_proportion([10] * 5 + [0] * 5, [10] * 10), clopper_pearson(4.5, 9)
    assert (found.value, found.lo, found.hi) == pytest.approx((0.5, of_calls.lo, of_calls.hi))
    even, plain = clustered_proportion([5] * 10, [10] * 10), clopper_pearson(50, 100)
    assert (even.lo, even.hi) == (plain.lo, plain.hi), "no variance between calls does not narrow it"


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 20))
@settings(deadline=None, max_examples=40)
def test_mcnemar_is_the_binomial_test_of_those_that_differ(won, lost, same):
    base, candidate = [0] * won + [1] * lost + [1] * same, [1] * won + [0] * lost + [1] * same
    expected = stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert mcnemar_p(base, candidate) == pytest.approx(expected)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=10, max_size=60))
@settings(deadline=None)
def test_a_difference_turns_over_with_its_sides(pairs):
    base, candidate = np.array(pairs, float).T
    one, other = paired_difference(base, candidate), paired_difference(candidate, base)
    assert (one.value, one.lo, one.hi) == pytest.approx((-other.value, -other.hi, -other.lo))
    assert one.lo <= one.value <= one.hi


@pytest.mark.parametrize("n", [50, 400])
def test_the_standard_error_of_a_median_is_not_less_than_that_of_theory(n):
    """sqrt(pi / 2 / n) for normal samples, in the limit; ranks are whole, so it is more: 1.4 times for 50 samples."""
    x = np.random.default_rng(n).standard_normal((1500, n))
    mean = np.mean([median_se(row) for row in x])
    assert 1.0 <= mean / math.sqrt(math.pi / 2 / n) <= 1.45
    assert math.isinf(median_se(x[0, :2]))


@given(st.floats(-1, 1), st.floats(0.1, 10), st.integers(1, 6))
@settings(deadline=None, max_examples=40)
def test_an_effect_follows_its_ratios(shift, scale, k):
    rng = np.random.default_rng(k)
    pairs = [0.01 * rng.standard_normal(20) for _ in range(k)]
    one = paired_effect(pairs, 0.01)
    moved = paired_effect([scale * pair + shift for pair in pairs], 0.01 * scale)
    assert moved.log_ratio == pytest.approx(one.log_ratio * scale + shift, abs=1e-12)
    assert moved.se == pytest.approx(one.se * scale)
    between = (one.se**2 - one.se_within**2) / (0.01**2 / k)
    assert between == pytest.approx(1) if k < 3 else 1 < between < math.pi / 2, "a median is worth less than a mean"
    assert (one.pairs, one.turns) == (k, 20 * k)


def test_an_effect_knows_its_interval_and_its_p():
    effect = paired_effect([np.full(20, 0.0625)] * 4, 0.02)
    se = 0.01 * math.sqrt(math.pi / 2)  # turns without spread: the median of the process pairs themselves
    assert (effect.log_ratio, effect.se_within, effect.se) == pytest.approx((0.0625, 0.0, se))
    assert effect.interval(2.0) == pytest.approx((math.exp(0.0625 - 2 * se), math.exp(0.0625 + 2 * se)))
    assert effect.p_above(0.0625 - 2 * se) == pytest.approx(stats.norm.sf(2.0))
    with pytest.raises(ValueError, match="needs a process pair"):
        paired_effect([[]], 0.01)


def slower(rng, effect, turns=60, noise=0.03, tau=0.015):
    """Whether five process pairs call a candidate of this effect a regression by more than 1 %."""
    bias = tau * rng.standard_normal(5)
    found = paired_effect([math.log1p(effect) + one + noise * rng.standard_normal(turns) for one in bias], tau)
    return found.interval(look_bound(1))[0] > 1.01


@pytest.mark.parametrize("noise", [0.03, 0.1])
def test_the_gate_rule_is_seldom_wrong_and_finds_five_percent(noise):
    """1200 experiments: the Monte-Carlo error is 0.9 points at a power of 90 %, 0.1 at a size of 0.1 %."""
    rng = np.random.default_rng(2)
    assert np.mean([slower(rng, 0.0, noise=noise) for _ in range(1200)]) <= 0.02
    assert np.mean([slower(rng, 0.05, turns=75, noise=noise) for _ in range(1200)]) >= 0.9


def test_a_slow_down_is_detectable_with_the_power_asked_for():
    """20 000 normal estimates: the Monte-Carlo error of 80 % is 0.3 points."""
    slow_down = detectable_effect(0.01, 1.96, 0.01, power=0.8)
    estimates = math.log1p(slow_down) + 0.01 * np.random.default_rng(3).standard_normal(20_000)
    assert np.mean(estimates - 1.96 * 0.01 > math.log1p(0.01)) == pytest.approx(0.8, abs=0.012)


def test_tau_is_what_pairs_differ_by_beyond_their_turns_and_never_below_its_floor():
    rng = np.random.default_rng(4)
    apart = [b + 0.02 * rng.standard_normal(60) for b in 0.03 * rng.standard_normal(60)]
    assert between_process_tau(apart).measured == pytest.approx(0.03, rel=0.25)
    alike = between_process_tau([0.02 * rng.standard_normal(60) for _ in range(60)])
    assert alike.measured < 0.005
    assert alike.value == 0.015
    few = between_process_tau(apart[:2])
    assert (few.value, few.measured, few.pairs) == (0.015, None, 2)


def test_a_change_is_found_where_it_is_and_only_where_it_is_large_enough():
    x = 100 + np.random.default_rng(5).standard_normal(60)
    x[20:40] += 8
    assert [change.index for change in change_points(x)] == [20, 40]
    assert [change.index for change in change_points(x[::-1])] == [20, 40]
    assert change_points(x, min_magnitude=0.2) == []
    step = change_points([5.0] * 10 + [6.0] * 10)[0]
    assert (step.index, step.before, step.after, step.magnitude) == (10, 5.0, 6.0, pytest.approx(0.2))


def test_noise_alone_seldom_shows_a_change():
    """300 histories of 60 runs: the split is the best of many, so more than 0.1 %; Monte-Carlo error 0.8 points."""
    x = 100 + np.random.default_rng(6).standard_normal((300, 60))
    assert np.mean([bool(change_points(row)) for row in x]) <= 0.045
    assert change_points([3.0] * 40) == []
    assert change_points([1.0, 9.0]) == []


@given(st.floats(0.1, 100))
@settings(deadline=None, max_examples=20)
def test_changes_do_not_depend_on_the_unit(scale):
    x = np.concatenate([np.random.default_rng(7).normal(10, 1, 30), np.random.default_rng(8).normal(13, 1, 30)])
    assert [change.index for change in change_points(x * scale)] == [change.index for change in change_points(x)]
