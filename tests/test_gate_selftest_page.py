"""The page of the gate's self-test says what its kept records say; the records are complete."""

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent / "gate_selftest"


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("report")


@pytest.fixture
def records(report):
    return importlib.import_module("records")


def test_calls_of_two_machines_are_never_mixed(report, tmp_path):
    (tmp_path / "host.json").write_text('{"host_key": "another"}')
    with pytest.raises(SystemExit, match="another machine"):
        importlib.import_module("collect").collect(tmp_path, 1, 0.0)


def test_the_page_is_made_of_the_records(report, records):
    assert report.PAGE.read_text(encoding="utf-8") == report.page(records.KEPT)


def test_every_cell_was_called_as_often_as_the_others(records):
    calls = records.load_calls(records.KEPT)
    assert {len(found) for found in calls.values()} == {12}
    assert all(len(call["judged"]) + len(call["skipped"]) == 8 for found in calls.values() for call in found)


def test_kept_turns_are_those_of_the_calls_without_injected_work(records):
    for load in records.LOADS:
        turns = records.load_turns(records.KEPT, [load])
        said = [one for call in records.load_calls(records.KEPT)[0, load] for one in call["judged"]]
        assert len(turns) == sum(one["pairs"] for one in said)
        assert sum(len(one.candidate) for one in turns) == sum(one["turns"] for one in said)
        assert all(len(one.candidate) == len(one.again) for one in turns)
