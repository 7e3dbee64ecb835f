"""Real workers: what they get, what they survive, and that the parent sleeps while they are timed."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from moebench.bench import config
from moebench.bench.plan import make_plan
from moebench.bench.protocol import PROTOCOL
from moebench.bench.ring import Ring, WorkerError, ring_cores, worker_environment
from moebench.contracts import Registry

SLOW = str(Path(__file__).parent.parent / "plugins" / "slow.py")


@pytest.fixture(scope="module")
def ring():
    ring = Ring([{}], 1, [SLOW])
    yield ring
    ring.close()


@pytest.fixture(scope="module")
def case():
    registry = Registry.load([SLOW])
    settings = ["suite=selftest", "axes.routing=topk", "axes.backend=slow"]
    (case,) = make_plan(config.load(settings, registry, 4e9, 1e7), registry, 4e9).cases
    return case


def test_a_worker_is_pinned_to_the_cores_of_the_ring(ring):
    process = psutil.Process(ring.worker({})._process.pid)
    assert process.cpu_affinity() == ring.cores == ring_cores(1)
    environment = process.environ()
    assert [environment[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")] == ["1", "1"]
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"


def test_a_worker_says_what_it_runs(ring):
    assert ring.versions["protocol"] == PROTOCOL
    assert ring.versions["threads"] == 1
    assert set(ring.versions["versions"]) == {"python", "torch"}


def test_a_worker_of_another_protocol_refuses(ring):
    with pytest.raises(WorkerError, match="worker speaks protocol"):
        ring.worker({}).request("hello", 60, plugins=[], protocol=PROTOCOL + 1)


def test_a_mistake_in_a_request_costs_only_the_request(ring):
    with pytest.raises(WorkerError, match="KeyError"):
        ring.worker({}).request("turn", 60, trial="none", first_step=0, calls=1)
    assert ring.worker({}).alive


def test_the_parent_sleeps_while_a_worker_is_timed(ring, case):
    worker = ring.worker({})
    reply = worker.request("prepare", 60, trial="t", case=case.to_json())
    assert reply["executed"]["weights"] == "dense"
    before, started = time.process_time(), time.perf_counter()
    turn = worker.request("turn", 60, trial="t", first_step=0, calls=5)
    spent, elapsed = time.process_time() - before, time.perf_counter() - started
    assert len(turn["ns"]) == len(turn["cpu_ns"]) == 5
    assert elapsed >= sum(turn["ns"]) / 1e9 >= 5 * 0.2
    assert spent < 0.2
    assert max(turn["cpu_ns"]) < 0.2e9  # the worker sleeps too: its two clocks tell different things
    assert worker.request("verify", 60, trial="t")["check"]["ok"]
    assert worker.request("close", 60, trial="t") == {}


def test_a_worker_ends_when_its_ring_is_closed():
    ring = Ring([{}, {}], 1, [])
    processes = [worker._process for worker in ring._workers.values()]
    assert len(processes) == 1  # cases with the same environment share a worker
    ring.close()
    assert [process.returncode for process in processes] == [0]


def test_cases_may_bring_variables_of_their_own():
    environment = worker_environment({"OMP_WAIT_POLICY": "ACTIVE", "MINE": "1"}, 2)
    assert (environment["OMP_WAIT_POLICY"], environment["MINE"]) == ("ACTIVE", "1")
    assert environment["OMP_NUM_THREADS"] == "2"
