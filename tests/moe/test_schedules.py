"""Schedules: their ends, their shape, and that a whole number of experts never jumps back."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebench.moe.schedules import Schedule, k_at, value_at

shapes = st.sampled_from(["linear", "exponential"])
values = st.floats(1e-3, 1e3)
progress = st.floats(0, 1)


@given(values, values, shapes, st.floats(0.1, 1), progress)
def test_a_schedule_stays_between_its_ends_and_holds_the_last(start, end, shape, until, now):
    schedule = Schedule(start, end, shape, until)
    assert schedule.at(0.0) == start
    assert schedule.at(until) == schedule.at(1.0) == end
    slack = 1e-9 * max(start, end)
    assert min(start, end) - slack <= schedule.at(now) <= max(start, end) + slack


@given(values, values, shapes, progress, progress)
def test_a_schedule_goes_one_way(start, end, shape, one, other):
    first, second = (Schedule(start, end, shape).at(now) for now in sorted((one, other)))
    slack = 1e-9 * max(start, end)
    assert second >= first - slack if end >= start else second <= first + slack


@given(progress)
def test_evomoe_cools_as_its_formula_says(now):
    """tau(t) = max(tau_max exp(ln(tau_min / tau_max) t / D), tau_min)."""
    assert Schedule(1.0, 0.5, "exponential").at(now) == pytest.approx(max(math.exp(math.log(0.5) * now), 0.5))


def test_linear_and_exponential_meet_only_at_the_ends():
    assert Schedule(1.0, 0.25).at(0.5) == 0.625
    assert Schedule(1.0, 0.25, "exponential").at(0.5) == 0.5
    assert Schedule(1.0, 0.25, until=0.5).at(0.25) == 0.625


def test_experts_fall_from_all_to_one_through_every_number():
    falling = [k_at(Schedule(16.0, 1.0), step / 1000) for step in range(1001)]
    assert falling == sorted(falling, reverse=True)
    assert set(falling) == set(range(1, 17))
    assert k_at(Schedule(1.0, 0.0), 1.0) == 1


def test_a_number_is_its_own_schedule():
    assert value_at(1.25, 0.3) == 1.25
    assert value_at(Schedule(2.0, 1.0), 0.5) == 1.5


def test_impossible_schedules_are_refused():
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
        Schedule(1.0, 0.5, until=0.0)
    with pytest.raises(ValueError, match="needs positive values"):
        Schedule(1.0, 0.0, "exponential")
