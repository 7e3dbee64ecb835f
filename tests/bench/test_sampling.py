"""When enough is enough, what counts as falling back, and how a member leaves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.bench.config import EngineConfig
from moebench.bench.ring import WorkerDiedError, WorkerError, WorkerTimeoutError
from moebench.bench.sampling import (
    MAX_CALLS,
    TURN_NS,
    Member,
    Phases,
    RingLostError,
    Sitting,
    _steady,
    fallback_reason,
    precise,
)
from moebench.contracts import Execution, Status


def test_too_few_samples_are_never_precise():
    assert not precise([], 0.5)
    assert not precise([100] * 5, 0.5)
    assert precise([100] * 6, 0.0)


@given(st.lists(st.integers(1, 10**9), min_size=6, max_size=60), st.floats(0, 1))
@settings(deadline=None)
def test_precision_is_monotonic_and_free_of_the_unit(ns, precision):
    if precise(ns, precision):
        assert precise(ns, precision + 0.1)
        assert precise([16 * n for n in ns], precision)
        assert precise(sorted(ns), precision)


def test_a_wide_interval_on_one_side_is_not_precise():
    assert precise([100] * 90 + [1000] * 10, 0.01)
    assert not precise([100] * 55 + [1000] * 45, 0.01)


def test_steady_needs_two_windows_that_agree():
    assert not _steady([100] * 9, 0.1)
    assert _steady([100] * 10, 0.1)
    assert _steady([1000, 500] + [100] * 10, 0.1)  # only the latest count
    assert not _steady([200] * 5 + [100] * 5, 0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Falling back


@pytest.mark.parametrize(
    ("execution", "executed", "seen", "words"),
    [
        (Execution(), {"weights": "dense", "sparse": "none"}, [], ""),
        (Execution(), None, [], ""),
        (
            Execution("packed"),
            {"weights": "dequantized", "sparse": "none"},
            [],
            "plan says weights=packed, the backend",
        ),
        (Execution(sparse="skip"), {"weights": "dense", "sparse": "mask"}, [], "plan says sparse=skip, the backend"),
        (Execution(), {"weights": "dense", "sparse": "none"}, ["aten.mm.default"], "the plan excludes aten.mm.default"),
    ],
)
def test_falling_back_is_told(execution, executed, seen, words, case):
    reason = fallback_reason(case(execution=execution), executed, seen)
    assert (words in reason) if words else reason == ""


# ---------------------------------------------------------------------------------------------------------------------
# A sitting over a worker that is played


class Worker:
    """Answers as a worker would; ``calls`` take ``ns``, and ``trouble`` maps (trial, op) to an exception."""

    def __init__(self, ns, trouble=None, check=None):
        self.ns, self.trouble, self.check, self.log = ns, trouble or {}, check or {}, []

    def request(self, op, timeout, on_progress=None, trial=None, **arguments):
        self.log.append((op, trial, arguments))
        if (trial, op) in self.trouble:
            raise self.trouble[trial, op]
        ns = [self.ns] * arguments.get("calls", 0)
        executed = {"weights": "dense", "sparse": "none"}
        return {
            "prepare": {"steps": 3, "executed": executed, "seen": [], "input_sha256": "x", "seconds": 0.0},
            "turn": {"ns": ns, "cpu_ns": ns, "switches": 1, "warm_s": 0.0, "ready_s": 0.0},
            "verify": {"check": {"ok": True, "error": 1e-7, **self.check.get(trial, {})}},
            "facts": {"facts": {"executed": executed}, "cost": {}, "rss": 1},
        }[op]


class OneRing:
    def __init__(self, worker):
        self.worker = lambda environment: worker


def sit(worker, members, **engine):
    settings_ = {"seconds": 0.01, "min_calls": 20, "warmup_seconds": 0.01, **engine}
    Sitting(OneRing(worker), EngineConfig(**settings_), 0, Phases(), lambda text: None).measure(members)


@pytest.fixture
def members(case):
    return [Member(case(tokens=tokens)) for tokens in (1, 2, 3)]


def test_every_turn_is_long_enough_and_verified(members):
    worker = Worker(ns=30_000)
    sit(worker, members)
    for member in members:
        assert member.alive
        assert member.calls * 30_000 >= TURN_NS
        assert len(member.wall_ns) == len(member.cpu_ns) == len(member.turns) >= 20
        mine = [op for op, trial, _ in worker.log if trial == member.case.case_key]
        sampled = len(set(member.turns))
        assert mine.count("verify") == 1 + sampled  # the first check, and one after each sampled turn
        assert mine[mine.index("verify") - 1] == "turn"


def test_turns_of_all_members_alternate_in_changing_order(members):
    worker = Worker(ns=200_000)
    sit(worker, members, precision=1e-9, seconds=0.02)
    assert len({tuple(m.turns) for m in members}) == 1  # everybody took the same rounds
    sampled = [trial for op, trial, _ in worker.log if op == "turn"][-3 * len(set(members[0].turns)) :]
    rounds = [tuple(sampled[i : i + 3]) for i in range(0, len(sampled), 3)]
    assert all(len(set(order)) == 3 for order in rounds)
    assert len(set(rounds)) > 1


def test_a_turn_has_at_most_so_many_calls(members):
    sit(Worker(ns=1), members[:1])
    assert members[0].calls == MAX_CALLS // members[0].steps * members[0].steps


def test_a_wrong_answer_ends_a_member_without_samples(members):
    bad = members[1].case.case_key
    sit(Worker(ns=200_000, check={bad: {"ok": False, "reason": "off"}}), members)
    assert [member.status for member in members] == [Status.OK, Status.WRONG, Status.OK]
    assert members[1].reason == "off"
    assert members[1].wall_ns == members[1].cpu_ns == members[1].turns == []
    assert all(member.wall_ns for member in (members[0], members[2]))


def test_an_error_of_one_member_spares_the_others(members):
    bad = members[0].case.case_key
    sit(Worker(ns=200_000, trouble={(bad, "prepare"): WorkerError("no memory", "where")}), members)
    assert [member.status for member in members] == [Status.FAILED, Status.OK, Status.OK]
    assert (members[0].reason, members[0].traceback) == ("no memory", "where")


@pytest.mark.parametrize(
    ("error", "status"), [(WorkerDiedError("gone"), Status.CRASHED), (WorkerTimeoutError("late"), Status.TIMED_OUT)]
)
@pytest.mark.parametrize("op", ["prepare", "turn", "verify", "facts"])
def test_a_lost_worker_names_its_culprit(op, error, status, members):
    bad = members[1]
    with pytest.raises(RingLostError) as caught:
        sit(Worker(ns=200_000, trouble={(bad.case.case_key, op): error}), members)
    assert caught.value.member is bad
    assert (bad.status, bad.wall_ns) == (status, [])
    assert bad.reason.startswith(str(error))


def test_what_is_not_steady_in_time_is_marked(members):
    class Drifting(Worker):
        def request(self, op, timeout, **arguments):
            self.ns = int(self.ns * 1.2) + 1
            return super().request(op, timeout, **arguments)

    sit(Drifting(ns=100_000), members[:1], seconds=0.001)
    assert members[0].alive
    assert not members[0].steady


def test_a_stream_takes_whole_rounds_and_no_other_call(members):
    """Its turns are all steps in order: what is in a cache at a step depends on all steps before."""

    class Stream(Worker):
        def request(self, op, timeout, **arguments):
            return super().request(op, timeout, **arguments) | ({"steps": 7, "stream": True} if op == "prepare" else {})

    worker = Stream(ns=1_000_000)
    sit(worker, members, min_calls=20, seconds=0.02, precision=0.5)
    for member in members:
        turns = [more for op, trial, more in worker.log if (op, trial) == ("turn", member.case.case_key)]
        assert [(turn["first_step"] % 7, turn["calls"]) for turn in turns] == [(0, 7)] * len(turns)
        assert len(turns) == 1 + len(set(member.turns))  # the one that is checked first is not sampled, nor repeated
        assert len(member.wall_ns) % 7 == 0
        assert len(member.wall_ns) >= 20
