"""``moebench trend``: histories with the points at which a level moved."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from moebench.bench.cli import main
from moebench.bench.host import host_facts

stored = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("stored.py"))))
case, write_run = stored.case, stored.write_run
GOLDEN = Path(__file__).parent / "golden" / "trend.txt"
HOST = "h" * 64
NOISE = (0.0, 0.3, -0.2, 0.1, -0.3, 0.2)


def trend(capsys, *arguments):
    status = main(["trend", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def store(tmp_path):
    """Twelve runs: eager gets 10 % slower at the seventh, grouped stays, packed is new, one run was contended."""
    store = tmp_path / "store"
    for day in range(12):
        level = 110 if day >= 6 else 100
        cases = [
            case("eager", level + NOISE[day % 6], {"bytes": 10 + (day >= 8)}),
            case("grouped", 50 + NOISE[day % 6]),
        ]
        cases += [case("packed", 40, suite="latency")] if day >= 9 else []
        cases += [case("batched", 900 if day == 3 else 70 + NOISE[day % 6], flags=["contended"] if day == 3 else [])]
        write_run(store, day, *cases, sha=f"{day:02d}abcdef", dirty=day == 11)
    write_run(store, 20, case("eager", 500), host="other")
    return store


def test_the_table_is_the_golden_one(capsys, store):
    status, out, err = trend(capsys, "--host", HOST)
    assert (status, err) == (0, "")
    assert out == GOLDEN.read_text()


def marked(out):
    return [line for line in out.splitlines() if "<-" in line]


def test_a_change_is_marked_where_it_happened(capsys, store):
    _, out, _ = trend(capsys, "--host", HOST, "--backend", "eager")
    (line,) = marked(out)
    assert "2026-03-20" in line
    assert "up 10 %" in line


def test_without_a_change_nothing_is_marked(capsys, store):
    _, out, _ = trend(capsys, "--host", HOST, "--backend", "grouped")
    assert not marked(out)
    assert "0 changes of level" in out


def test_flagged_runs_are_shown_and_not_counted(capsys, store):
    _, out, _ = trend(capsys, "--host", HOST, "--backend", "batched")
    assert not marked(out)
    assert "(contended: not counted)" in out


def test_a_metric_moves_at_once(capsys, store):
    _, out, _ = trend(capsys, "--host", HOST, "--metric", "bytes")
    (line,) = marked(out)
    assert "2026-03-22" in line
    assert "up 10 %" in line


def test_too_few_runs_are_told(capsys, store):
    _, out, _ = trend(capsys, "--host", HOST, "--suite", "latency")
    assert "3 more runs are needed to look for changes (3 of 6 without flags)" in out
    assert "1 with fewer runs than the 6 that a change needs" in out


def test_hosts_are_never_mixed(capsys, store):
    _, out, _ = trend(capsys, "--host", "all", "--backend", "eager")
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith("host ")] == [
        "host hhhhhhhhhhhh",
        "host other",
    ]
    assert len(marked(out)) == 1


def test_the_host_is_this_one_by_default(capsys, store):
    status, _, err = trend(capsys)
    assert status == 2
    assert "no ok case of this host has a time under these filters" in err
    assert "--host all" in err
    write_run(store, 30, case("eager", 1), host=host_facts()["host_key"])
    status, out, _ = trend(capsys)
    assert status == 0
    assert "1 run, median per call" in out


def test_a_case_is_named_by_the_beginning_of_its_key(capsys, store):
    _, out, _ = trend(capsys, "--host", HOST, "--case", stored.key("grouped")[:12])
    assert "1 history" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--host", "all", "--metric", "nonsense"), "no run has a metric 'nonsense'; take time or bytes."),
        (("--host", "all", "--suite", "x' OR 1=1 --"), "no ok case of any host has a time under these filters"),
        (("--host", "nobody"), "no ok case of host 'nobody' has a time"),
    ],
)
def test_mistakes_are_one_sentence_and_status_2(arguments, words, capsys, store):
    status, out, err = trend(capsys, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert words in err
