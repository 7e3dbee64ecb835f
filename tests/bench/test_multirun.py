"""``moebench run -m``: several runs by one command, and no comparison torn apart."""

from __future__ import annotations

import pytest


def test_one_run_for_each_seed(engine, small, query, tmp_path):
    result = engine(tmp_path, "run", "-m", *small, "seed=0,1", "--quiet")
    assert result.returncode == 0, result.stderr
    assert query(tmp_path, "SELECT seed, count(DISTINCT run_id) FROM cases GROUP BY seed ORDER BY seed") == [
        (0, 1),
        (1, 1),
    ]


def test_a_failed_run_returns_its_status_and_the_others_go_on(engine, small, query, tmp_path):
    result = engine(tmp_path, "run", "-m", *small, "model=tiny", "model.experts=8,0", "--quiet")
    assert result.returncode == 2
    assert "run 1" in result.stderr
    assert query(tmp_path, "SELECT count(DISTINCT run_id) FROM cases WHERE status = 'ok'") == [(1,)]


@pytest.mark.parametrize("setting", ["axes.backend=eager,grouped", "params.routing.moepp.tau=0.1,0.2"])
def test_an_axis_is_refused(setting, engine, tmp_path):
    result = engine(tmp_path, "run", "-m", "suite=selftest", setting)
    assert result.returncode == 2
    assert "tear a comparison apart" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_mistyped_suite_gets_a_suggestion(engine, tmp_path):
    result = engine(tmp_path, "run", "-m", "suite=selftst,latency", "seed=1,2")
    assert result.returncode == 2
    assert "did you mean 'selftest'" in result.stderr
