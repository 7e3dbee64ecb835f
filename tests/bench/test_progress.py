"""What is told of a case that runs once."""

from __future__ import annotations

import pytest

from moebench.bench import progress


def test_what_is_left_is_counted_from_the_first_step(monkeypatch):
    times = iter([1000.0, 1060.0, 1120.0, 1180.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(times))
    countdown = progress.Countdown()
    said = [countdown.left(step, 4) for step in (1, 2, 3, 4)]
    assert said == ["", ", about 2.0 minutes left", ", about 1.0 minutes left", ""]


@pytest.mark.parametrize("steps", [1, 2])
def test_nothing_is_left_after_the_last_step(steps):
    countdown = progress.Countdown()
    assert [countdown.left(step, steps) for step in range(1, steps + 1)][-1] == ""
