"""Quantizations that lie about their bytes or decode to something else: ``wrong``, a reason, and no numbers."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

HOSTILE = Path(__file__).parent.parent / "plugins" / "hostile_codecs.py"
EXPECTED = runpy.run_path(str(HOSTILE))["EXPECTED"]


@pytest.fixture(scope="module")
def hostile_run(engine, tmp_path_factory):
    store = tmp_path_factory.mktemp("hostile")
    names = ",".join(["rtn", *EXPECTED])
    settings = ("suite=quantization", "model=tiny", "axes.dtype=bfloat16", "suite.tokens=256", "--quiet")
    group = "params.quantization.rtn.group=32"
    return store, engine(store, "run", f"plugin={HOSTILE}", f"axes.quantization=[{names}]", group, *settings)


@pytest.fixture(scope="module")
def rows(hostile_run, query):
    """Return quantization -> (status, reason, number of metrics, of series)."""
    counts = ", ".join(f"(SELECT count(*) FROM {t} x WHERE x.case_key = c.case_key)" for t in ("metrics", "series"))
    found = query(hostile_run[0], f"SELECT quantization, status, reason, {counts} FROM cases c")
    return {name: told for name, *told in found}


def test_the_run_goes_to_its_end_and_fails(hostile_run, rows):
    assert hostile_run[1].returncode == 1, hostile_run[1].stderr
    assert "Traceback" not in hostile_run[1].stderr
    assert set(rows) == {"rtn", *EXPECTED}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_ends_as_it_must_and_a_wrong_one_has_no_numbers(name, rows):
    status, words = EXPECTED[name]
    found, reason, metrics, series = rows[name]
    assert found == status, reason
    assert words in reason
    assert (metrics > 0, series > 0) == (status == "ok", status == "ok")


def test_ours_beside_them_is_unharmed(rows):
    assert rows["rtn"][0] == "ok"


def test_codes_that_cannot_be_written_have_no_bytes_on_disk(hostile_run, query):
    sql = (
        "SELECT name, value FROM metrics WHERE quantization = 'own_codes' AND name IN ('file_bytes', 'bits_per_weight')"
    )
    found = dict(query(hostile_run[0], sql))
    assert found["file_bytes"] is None
    assert 8 < found["bits_per_weight"] < 8.1
