import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moebench.results.statistics import (
    bootstrap_interval,
    lag1_autocorrelation,
    median_interval,
    paired_log_ratio,
    quantile_interval,
    quantile_n_required,
    steady_start,
    summary,
)
from moebench.results.statistics.order import _ranks
from moebench.results.verdict import Verdict, verdict

finite = st.floats(-1e9, 1e9)


@pytest.mark.parametrize(("q", "n"), [(0.5, 6), (0.9, 36), (0.95, 72), (0.99, 368), (0.01, 368)])
def test_samples_required(q, n):
    assert quantile_n_required(q) == n
    assert quantile_interval(np.arange(n - 1), q).value is None
    assert quantile_interval(np.arange(n - 1), q).n_required == n
    assert None not in (quantile_interval(np.arange(n), q).lo, quantile_interval(np.arange(n), q).hi)


@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("q", [0.1, 0.5, 0.9, 0.99])
def test_ranks_are_those_of_the_binomial_tails(q, level):
    """lo is the highest rank with P(B <= rank) <= alpha / 2, hi the lowest with P(B > rank) <= alpha / 2."""
    for n in [*range(1, 60), 100, 367, 368, 369, 1000, 5000]:
        binomial, alpha = stats.binom(n, q), 1 - level
        lo, hi = int(binomial.ppf(alpha / 2)) - 1, int(binomial.isf(alpha / 2))
        lo += bool(binomial.cdf(lo + 1) <= alpha / 2)
        expected = (lo, hi) if lo >= 0 and hi < n else None
        assert _ranks(n, q, level) == expected, n


def test_ranks_hold_the_level_exactly_and_no_narrower_ones_do():
    for n in range(6, 400, 7):
        lo, hi = _ranks(n, 0.5, 0.95)
        binomial = stats.binom(n, 0.5)
        assert binomial.cdf(hi) - binomial.cdf(lo) >= 0.95
        assert binomial.cdf(lo + 1) > 0.025
        assert lo + hi == n - 1, "the median's ranks are symmetric"


def test_median_of_six_is_bounded_by_its_extremes():
    """Closed form: P(all six on one side) = 2 / 2**6 = 3.1 % < 5 %, and 2 / 2**5 = 6.3 % for five."""
    found = median_interval([3, 1, 2, 6, 5, 4])
    assert (found.value, found.lo, found.hi, found.n) == (3.5, 1, 6, 6)
    five = median_interval([3, 1, 2, 5, 4])
    assert (five.value, five.lo, five.hi, five.n_required) == (3, None, None, 6)


@given(st.lists(finite, min_size=1, max_size=80), st.floats(0.5, 2), st.floats(-100, 100))
@settings(deadline=None)
def test_order_statistics_are_samples_around_the_estimate_and_follow_the_data(x, scale, shift):
    found = median_interval(x)
    assert found.value == pytest.approx(np.median(x), rel=1e-12, abs=1e-6), "numpy rounds the two in different ways"
    if found.lo is not None:
        assert found.lo in x
        assert found.hi in x
        assert found.lo <= found.value <= found.hi
        moved = median_interval(np.asarray(x) * scale + shift)
        assert (moved.lo, moved.hi) == (found.lo * scale + shift, found.hi * scale + shift)
    assert median_interval(x[::-1]) == found


@pytest.mark.parametrize(("q", "n"), [(0.5, 25), (0.9, 60), (0.99, 400)])
def test_coverage_of_quantile_intervals(q, n):
    """1000 seeded experiments on a skewed distribution: at least 95 % less three standard errors."""
    x = np.random.default_rng(1).lognormal(size=(1000, n))
    true = math.exp(stats.norm.ppf(q))
    found = [quantile_interval(row, q) for row in x]
    assert np.mean([f.lo <= true <= f.hi for f in found]) >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / 1000)


def test_bootstrap_agrees_with_scipy():
    x = np.random.default_rng(2).normal(10, 1, 200)
    ours = bootstrap_interval(x, np.mean, resamples=5000)
    theirs = stats.bootstrap((x,), np.mean, n_resamples=5000, method="percentile", rng=np.random.default_rng(3))
    assert (ours.lo, ours.hi) == pytest.approx(tuple(theirs.confidence_interval), abs=0.01)
    assert ours.value == x.mean()
    assert bootstrap_interval(x, np.mean, resamples=5000) == ours, "seeded"


def test_bootstrap_of_few_or_no_samples_has_no_bounds():
    assert bootstrap_interval([1.0, 2.0]).lo is None
    assert bootstrap_interval([1.0, 2.0]).value == 1.5
    assert bootstrap_interval([]).value is None


def test_paired_ratio_is_exact_where_the_pairs_are():
    b = np.random.default_rng(4).lognormal(size=40)
    found = paired_log_ratio(1.25 * b, b)
    assert (found.ratio, found.lo, found.hi) == pytest.approx((1.25, 1.25, 1.25), rel=1e-12)
    assert found.n == 40
    back = paired_log_ratio(b, 1.25 * b)
    assert back.ratio == pytest.approx(0.8, rel=1e-12)


@given(st.lists(st.tuples(st.floats(1, 100), st.floats(1, 100)), min_size=6, max_size=40))
@settings(deadline=None, max_examples=30)
def test_paired_ratio_turns_over_with_its_sides(pairs):
    a, b = np.array(pairs).T
    one, other = paired_log_ratio(a, b), paired_log_ratio(b, a)
    assert one.ratio * other.ratio == pytest.approx(1)
    assert (one.lo is None) == (other.hi is None)
    if one.lo is not None:
        assert one.lo <= one.hi
        assert one.lo * other.hi == pytest.approx(1)


def test_a_drift_that_both_sides_share_cancels_in_pairs():
    rng = np.random.default_rng(5)
    drift = np.exp(np.linspace(0, 1, 200))
    a, b = (drift * rng.lognormal(sigma=0.02, size=200) for _ in range(2))
    found = paired_log_ratio(1.1 * a, b)
    assert found.lo < 1.1 < found.hi
    assert found.hi / found.lo < 1.02


def test_what_is_no_measurement_is_refused():
    for bad in ([1.0, math.nan], [math.inf] * 8, [[1.0, 2.0]]):
        with pytest.raises(ValueError, match="arrays of finite numbers"):
            median_interval(bad)
    with pytest.raises(ValueError, match="as many of one as of the other"):
        paired_log_ratio([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="a time of 0 is no measurement"):
        paired_log_ratio([0.0, 1.0], [1.0, 2.0])


def test_lag1_autocorrelation():
    rng = np.random.default_rng(7)
    x = rng.normal(size=4000)
    for i in range(1, 4000):
        x[i] += 0.5 * x[i - 1]
    assert lag1_autocorrelation(x) == pytest.approx(0.5, abs=0.05)
    assert lag1_autocorrelation(rng.normal(size=4000)) == pytest.approx(0, abs=0.05)
    assert lag1_autocorrelation([1, -1] * 50) == pytest.approx(-0.99)
    assert lag1_autocorrelation([2.0] * 9) is None
    assert lag1_autocorrelation([1.0, 2.0]) is None
    assert lag1_autocorrelation([]) is None


def test_steady_start_is_where_two_windows_agree():
    assert steady_start([9, 8, 7, 1, 1, 1, 1], window=2, tolerance=0.02) == 3
    assert steady_start([1] * 4, window=2, tolerance=0) == 0
    assert steady_start([1] * 3, window=2, tolerance=0) is None
    assert steady_start(1.1 ** np.arange(50), window=5, tolerance=0.02) is None
    assert steady_start(1.1 ** -np.arange(50.0), window=5, tolerance=0.02) is None
    assert steady_start([40.0, *([7.0, 7.1] * 10)], window=4, tolerance=0.02) <= 1
    with pytest.raises(ValueError, match="a window has at least one turn"):
        steady_start([1.0], window=0, tolerance=0.1)


@given(st.lists(st.floats(1, 1e6), max_size=40), st.integers(1, 6), st.floats(0, 0.5))
@settings(deadline=None)
def test_steady_start_is_the_first_index_that_keeps_the_rule(x, window, tolerance):
    def agrees(i):
        first, second = np.median(x[i : i + window]), np.median(x[i + window : i + 2 * window])
        return abs(first - second) <= tolerance * min(first, second)

    candidates = [i for i in range(len(x) - 2 * window + 1) if agrees(i)]
    assert steady_start(x, window, tolerance) == (candidates[0] if candidates else None)


def test_summary_leaves_out_what_n_does_not_bear():
    few = summary([5, 3, 4])
    assert few == {
        "n": 3, "min_ns": 3, "mean_ns": 4.0, "median_ns": 4.0, "median_lo_ns": None, "median_hi_ns": None,
        "p90_ns": None, "p95_ns": None, "p99_ns": None,
    }  # fmt: skip
    many = summary(np.arange(1, 369))
    assert (many["p90_ns"], many["p99_ns"]) == pytest.approx((331.3, 364.33))
    assert summary(np.arange(367))["p99_ns"] is None
    assert (summary([])["n"], summary([])["min_ns"], summary([])["median_ns"]) == (0, None, None)


def test_two_modes_stay_two_modes():
    """A median alone hides two modes; its interval spans them when they are even."""
    found = median_interval([10] * 50 + [20] * 50)
    assert (found.lo, found.hi) == (10, 20)


@pytest.mark.parametrize(
    ("lo", "hi", "margin", "expected"),
    [
        (1.03, 1.10, 0.02, "regressed"),
        (1.01, 1.10, 0.02, "inconclusive"),
        (0.90, 0.97, 0.02, "improved"),
        (0.90, 0.99, 0.02, "inconclusive"),
        (0.99, 1.01, 0.02, "equivalent"),
        (0.90, 1.10, 0.02, "inconclusive"),
        (1.02, 1.02, 0.02, "equivalent"),
        (1.001, 1.002, 0.0, "regressed"),
        (None, None, 0.02, "inconclusive"),
    ],
)
def test_verdicts(lo, hi, margin, expected):
    assert verdict(lo, hi, margin) == expected


@given(st.floats(0.1, 10), st.floats(1, 3), st.floats(0, 1))
def test_verdicts_turn_over_with_the_ratio(lo, width, margin):
    opposite = {Verdict.REGRESSED: Verdict.IMPROVED, Verdict.IMPROVED: Verdict.REGRESSED}
    hi = lo * width
    edges = [abs(math.log(bound) - side * math.log1p(margin)) for bound in (lo, hi) for side in (1, -1)]
    if min(edges) > 1e-9:
        here = verdict(lo, hi, margin)
        assert verdict(1 / hi, 1 / lo, margin) == opposite.get(here, here)


def test_a_bad_interval_has_no_verdict():
    for lo, hi in ((2.0, 1.0), (-1.0, 1.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="0 < lo <= hi"):
            verdict(lo, hi, 0.02)
    with pytest.raises(ValueError, match="a margin is not negative"):
        verdict(1.0, 1.0, -0.1)
