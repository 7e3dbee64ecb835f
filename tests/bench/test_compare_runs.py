"""``moebench compare``: times without a verdict, verdicts on what has no chance in it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from moebench.bench.cli import main
from moebench.bench.run_ids import find_run
from moebench.contracts import MoebenchError

stored = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("stored.py"))))
case, write_run = stored.case, stored.write_run
GOLDEN = Path(__file__).parent / "golden" / "compare_runs.txt"


def answers(wrong, n=2000):
    return [0.0 if number < wrong else 1.0 for number in range(n)]


def two_runs(store):
    """Two runs that differ in every way that the table shows."""
    a = write_run(
        store,
        0,
        case("eager", 100, {"flops": 100, "bytes": 10}),
        case("grouped", 50, {"flops": 100, "bytes": 10, "worker_peak_rss": 5}),
        case("packed", 40, {"flops": 100, "bytes": 10}),
        case("crashing", 10),
        case("other", 10, input_sha256="x"),
        case("gone", 10),
        case("quality", suite="accuracy", protocol="once", items=answers(200)),
    )
    b = write_run(
        store,
        1,
        case("eager", 110, {"flops": 100, "bytes": 10}),
        case("grouped", 40, {"flops": 100, "bytes": 12, "worker_peak_rss": 9}, flags=["contended"]),
        case("packed", 40, {"flops": 100}),
        case("crashing", status="crashed", reason="the worker was killed by SIGSEGV during 'turn'."),
        case("other", 10, input_sha256="y"),
        case("new", 10),
        case("quality", suite="accuracy", protocol="once", items=answers(400)),
        sha="5e6f7a8b",
        dirty=True,
    )
    return a, b


def compare(capsys, *arguments):
    status = main(["compare", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


def test_the_table_is_the_golden_one(capsys, store):
    two_runs(store)
    status, out, err = compare(capsys, "latest~1", "latest")
    assert (status, err) == (1, "")
    assert out == GOLDEN.read_text()
    assert out.startswith("taken apart: no verdict on times")


def test_slower_alone_is_no_regression(capsys, store):
    write_run(store, 0, case("eager", 100, {"flops": 1}))
    write_run(store, 1, case("eager", 900, {"flops": 1}))
    status, out, _ = compare(capsys, "latest~1", "latest")
    assert status == 0
    assert "9.000" in out
    assert "regressed" not in out


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (case("eager", 1, {"bytes": 1}), case("eager", 1, {"bytes": 2}), 1),
        (case("eager", 1, {"bytes": 2}), case("eager", 1, {"bytes": 1}), 0),
        (case("eager", 1), case("eager", 1, error=1e-3), 1),
        (case("eager", 1), case("eager", status="wrong"), 1),
        (case("eager", 1), case("eager", status="skipped"), 0),
        (case("eager", status="failed"), case("eager", status="failed"), 0),
        (case("eager", 1, {"bytes": 1}), case("eager", 1, {"bytes": 2}, input_sha256="other"), 0),
        (case("eager", 1, items=answers(0)), case("eager", 1, items=answers(200)), 1),
        (case("eager", 1, items=answers(5)), case("eager", 1, items=answers(6)), 0),
        (case("eager", 1), case("grouped", 1), 0),
    ],
)
def test_exit_status(before, after, expected, capsys, store):
    write_run(store, 0, before)
    write_run(store, 1, after)
    assert compare(capsys, "latest~1", "latest")[0] == expected


def test_other_hosts_are_told(capsys, store):
    write_run(store, 0, case("eager", 1))
    write_run(store, 1, case("eager", 1), host="other")
    assert "the hosts differ" in compare(capsys, "latest~1", "latest")[1]


def test_json_says_the_same(capsys, store):
    a, b = two_runs(store)
    status, out, _ = compare(capsys, a, b, "--json")
    found = json.loads(out)
    assert found["exit"] == status == 1
    assert found["times_taken_apart"].startswith("taken apart")
    assert (found["a"]["run_id"], found["b"]["run_id"]) == (a, b)
    ratios = {one["label"].split(" · ")[0]: one["ratio"] for one in found["times"]}
    assert ratios == {"eager": 1.1, "grouped": 0.8, "packed": 1.0}
    verdicts = {(one["label"].split(" · ")[0], one["metric"]): one["verdict"] for one in found["judged"]}
    assert verdicts["grouped", "bytes"] == "regressed"
    assert verdicts["packed", "bytes"] == "inconclusive"
    assert ("grouped", "worker_peak_rss") not in verdicts
    assert [one["case_key"] for one in found["only_a"]] == [stored.key("gone")]


RUNS = ("20260316-a", "20260315-b", "20260315-a")


@pytest.mark.parametrize(
    ("given", "expected"),
    [("latest", 0), ("latest~0", 0), ("latest~2", 2), ("20260316", 0), ("20260315-b", 1), ("20260315-a", 2)],
)
def test_short_names_of_runs(given, expected):
    assert find_run(given, RUNS) == RUNS[expected]


@pytest.mark.parametrize(
    ("given", "runs", "words"),
    [
        ("20260315", RUNS, r"fits 2 runs \(20260315-b, 20260315-a\); write more"),
        ("latest~3", RUNS, "the oldest of 3 runs is latest~2"),
        ("nonsense", RUNS, "there is no run 'nonsense'; the latest is 20260316-a"),
        ("", RUNS, "there is no run ''"),
        ("latest", (), "no run with cases"),
    ],
)
def test_a_name_that_is_none_is_told(given, runs, words):
    with pytest.raises(MoebenchError, match=words):
        find_run(given, runs)


def test_mistakes_are_one_sentence_and_status_2(capsys, store):
    write_run(store, 0, case("eager", 1))
    for arguments, words in ((("latest", "latest"), "are one run"), (("latest", "x' OR 1"), "there is no run")):
        status, out, err = compare(capsys, *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert words in err


def test_text_from_the_store_cannot_drive_the_terminal(capsys, store):
    write_run(store, 0, case("eager", 1))
    write_run(store, 1, case("eager", status="failed", reason="\x1b[2Jgone"))
    assert "\x1b" not in compare(capsys, "latest~1", "latest")[1]
