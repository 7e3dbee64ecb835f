"""Backends that crash, hang, lie or forget: each gets its own status with a reason, and the others are unharmed."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

HOSTILE = Path(__file__).parent.parent / "plugins" / "hostile.py"
EXPECTED = runpy.run_path(str(HOSTILE))["EXPECTED"]


@pytest.fixture(scope="module")
def hostile_run(engine, tmp_path_factory):
    store = tmp_path_factory.mktemp("hostile")
    backends = ",".join(["eager", *EXPECTED, "reference"])
    result = engine(
        store,
        "run",
        f"plugin={HOSTILE}",
        "suite=selftest",
        "axes.routing=topk",
        f"axes.backend=[{backends}]",
        "engine.turn_timeout=3",
        "engine.seconds=0.05",
        "engine.warmup_seconds=0.05",
        "--quiet",
    )
    return store, result


@pytest.fixture(scope="module")
def rows(hostile_run, query):
    """Return backend -> (status, reason, number of samples)."""
    found = query(hostile_run[0], "SELECT backend, status, reason, coalesce(sum(len(ns)), 0) FROM timings GROUP BY ALL")
    return {backend: (status, reason, samples) for backend, status, reason, samples in found}


def test_the_run_goes_to_its_end_and_fails(hostile_run, rows):
    assert hostile_run[1].returncode == 1, hostile_run[1].stderr
    assert "Traceback" not in hostile_run[1].stderr
    assert set(rows) == {"eager", "reference", *EXPECTED}


@pytest.mark.parametrize("backend", EXPECTED)
def test_each_gets_its_own_status_with_a_reason(backend, rows):
    status, words = EXPECTED[backend]
    assert rows[backend][0] == status, rows[backend]
    assert words in (rows[backend][1] or "")
    assert (rows[backend][2] > 0) == (status == "ok")


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_the_honest_ones_are_unharmed(backend, rows):
    status, reason, samples = rows[backend]
    assert (status, reason) == ("ok", None)
    assert samples >= 2 * 20  # two clocks, and at least min_calls each


def test_no_reason_is_a_traceback_or_more_than_one_line(rows):
    for status, reason, _ in rows.values():
        assert status == "ok" or (reason and "\n" not in reason and "Traceback" not in reason)


def test_the_store_keeps_every_rule(hostile_run, store_problems):
    assert store_problems(hostile_run[0]) == []


def test_no_ok_row_is_without_samples_and_no_other_row_has_any(hostile_run, query):
    broken = "(status = 'ok') = (coalesce(len(ns), 0) = 0)"
    assert query(hostile_run[0], f"SELECT backend FROM timings WHERE {broken}") == []
    assert query(hostile_run[0], f"SELECT backend FROM timings WHERE {broken}", database=True) == []


@pytest.mark.parametrize(("blob", "words"), [("worker", "straight to the descriptor"), ("traceback", "second line")])
def test_what_was_printed_and_the_tracebacks_are_kept(blob, words, hostile_run, query):
    store = hostile_run[0]
    found = query(store, f"SELECT DISTINCT sha256 FROM blobs WHERE name LIKE '{blob}-%'")
    assert words in "".join(path.read_text() for (sha,) in found for path in store.glob(f"runs/*/*/blobs/{sha}"))
