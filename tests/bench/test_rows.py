"""From members to rows; and the doubts that are put on ok rows."""

from __future__ import annotations

import math

import pytest

from moebench.bench.flags import Limits, contended, flags_of, phases_of
from moebench.bench.rows import case_row, measured_rows
from moebench.bench.run import exit_status
from moebench.bench.runner import Outcome
from moebench.bench.sampling import Member
from moebench.contracts import Check, Flag, Status
from moebench.results.parts import verify_part, write_part
from moebench.results.rows import arrow_table

NO_LIMITS = Limits({}, {})


@pytest.fixture
def member(case):
    """Return a measured member; wall times in ns, and CPU times as a share of them."""

    def make(wall=(1000,) * 30, share=1.0, cost=None, **fields):
        made = Member(fields.pop("case", None) or case(), **fields)
        made.wall_ns, made.cpu_ns = list(wall), [int(share * ns) for ns in wall]
        made.turns = list(range(len(wall)))
        made.cost = cost or {"flops": 1e3, "bytes": 1e3, "footprint": 1e3, "distinct_experts": 8, "assignments": 64}
        made.check = Check(True, 1e-6, 2e-5)
        made.facts = {"metrics": [], "series": [], "items": [], "notes": {}}
        return made

    return make


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def test_an_ok_case_has_two_clocks_for_each_process(member):
    tables = measured_rows("r", [member(), member()], [], ["s0", "s1"], first_process=4)
    found = [(row["process"], row["clock"], row["sitting"], row["n"]) for row in tables["timings"]]
    assert found == [(4, "wall", "s0", 30), (4, "cpu", "s0", 30), (5, "wall", "s1", 30), (5, "cpu", "s1", 30)]
    (row,) = tables["cases"]
    assert (row["status"], row["reason"], row["flags"]) == ("ok", None, [])
    for name, rows in tables.items():
        assert arrow_table(name, rows).num_rows == len(rows)


@pytest.mark.parametrize("status", [s for s in Status if s not in (Status.OK, Status.SKIPPED)])
def test_a_case_that_failed_in_one_process_has_no_timings(status, member):
    failed = member()
    failed.end(status, "because")
    for sittings in ([member(), failed], [failed, member()], [failed]):
        tables = measured_rows("r", sittings, [Flag.CONTENDED], ["s"] * len(sittings))
        assert set(tables) == {"cases"}
        (row,) = tables["cases"]
        assert (row["status"], row["reason"], row["flags"]) == (str(status), "because", [])


def test_the_worst_check_of_all_processes_is_kept(member):
    worse = member()
    worse.check, worse.flips = Check(True, 1e-5, 2e-5), 3
    (row,) = measured_rows("r", [worse, member()], [], ["a", "b"])["cases"]
    assert (row["error"], row["error_bound"], row["flips"]) == (1e-5, 2e-5, 3)


def test_a_case_that_runs_once_has_no_timings_and_an_elapsed_time(member, case):
    once = member(wall=(), case=case(protocol="once"), seconds=1.5)
    tables = measured_rows("r", [once], [], [""])
    assert "timings" not in tables
    assert tables["cases"][0]["elapsed_s"] == 1.5


def test_a_skipped_case_makes_a_part_of_its_own(case, tmp_path):
    row = case_row("r", case(), Status.SKIPPED, "no such thing")
    part = write_part(tmp_path / "runs" / "r", "g", {"cases": [row]})
    assert verify_part(part) is None


# ---------------------------------------------------------------------------------------------------------------------
# Flags


def test_an_undisturbed_member_has_no_flag(member):
    assert flags_of([member()], NO_LIMITS) == []


def test_who_shared_its_core_is_contended(member, case):
    assert contended(member(share=0.8))
    assert not contended(member(share=0.9))
    assert not contended(member(share=0.5, case=case(threads=2)))  # two clocks of several threads tell nothing
    assert flags_of([member(), member(share=0.5)], NO_LIMITS) == [Flag.CONTENDED]


def test_who_never_settled_is_not_steady(member):
    assert flags_of([member(), member(steady=False)], NO_LIMITS) == [Flag.NOT_STEADY]


LIMITS = Limits({"float32": 1e9}, {"L1": (1e3, 8e9), "L2": (1e6, 4e9), "DRAM": (math.inf, 1e9)})


@pytest.mark.parametrize(
    ("flops", "moved", "footprint", "ns", "expected"),
    [
        (1000, 1, 1, 1000, False),  # at the peak
        (1200, 1, 1, 1000, True),  # 1.2 times the peak
        (1, 8000, 1000, 1000, False),  # fits L1, at its speed
        (1, 8000, 1001, 1000, True),  # fits L2 only, at the speed of L1
        (1, 4000, 1e6, 1000, False),
        (1, 4000, 1e7, 1000, True),  # from DRAM at the speed of L2
        (1, 1100, None, 1000, False),  # without a footprint the bytes moved stand for it
    ],
)
def test_who_beats_the_host_is_implausible(flops, moved, footprint, ns, expected, member):
    cost = {"flops": flops, "bytes": moved, "footprint": footprint}
    one = member(wall=(ns, 5 * ns, 5 * ns), cost=cost)
    assert LIMITS.implausible(one) == expected
    assert (Flag.IMPLAUSIBLE in flags_of([one], LIMITS)) == expected
    assert not NO_LIMITS.implausible(one)


def test_threads_raise_the_limit_and_another_dtype_has_none(member, case):
    cost = {"flops": 1900, "bytes": 1, "footprint": 1}
    assert LIMITS.implausible(member(cost=cost))
    assert not LIMITS.implausible(member(cost=cost, case=case(threads=2)))
    assert not LIMITS.implausible(member(cost=cost, case=case(dtype="bfloat16")))


# ---------------------------------------------------------------------------------------------------------------------
# How a run ends


@pytest.mark.parametrize(
    ("counts", "flagged", "strict", "expected"),
    [
        ({"ok": 3, "skipped": 2}, 0, False, 0),
        ({"ok": 3}, 1, False, 0),
        ({"ok": 3}, 1, True, 1),
        ({"ok": 3}, 0, True, 0),
        *(({"ok": 3, str(s): 1}, 0, False, 1) for s in Status if s not in (Status.OK, Status.SKIPPED)),
    ],
)
def test_any_failed_case_fails_the_run_and_strict_counts_flags(counts, flagged, strict, expected):
    assert exit_status(Outcome(counts, flagged, {}), strict) == expected


def test_the_share_of_the_engine_is_what_no_phase_accounts_for():
    phases = phases_of({"calls": 3.0, "spawn": 5.0}, 10.0)
    assert (phases["engine"], phases["engine_share"]) == (2.0, 0.2)
    assert phases_of({}, 0.0)["engine_share"] is None
